"""FAKE ``aiter.ops.triton.utils``."""

"""FAKE ``aiter.ops.triton``."""

"""FAKE ``aiter.ops.triton.fusions``."""

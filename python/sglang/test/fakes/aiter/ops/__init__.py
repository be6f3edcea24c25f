"""FAKE ``aiter.ops``."""

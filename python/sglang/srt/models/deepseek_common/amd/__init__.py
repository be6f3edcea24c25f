"""Boundaries between sub-blocks that run as one op where the architecture gains by it."""

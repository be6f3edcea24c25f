"""Routed experts spread over ranks that exchange tokens: see ``layer``, ``gathered`` and ``factory``."""

"""Tokens to the ranks of their experts and back: see ``base`` for the rules, ``moriep`` for what layers use."""

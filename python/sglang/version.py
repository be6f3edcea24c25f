"""The version of the distribution sglang-amd."""

__version__ = "0.1.0"

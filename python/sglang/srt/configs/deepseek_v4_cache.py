"""What DeepSeek V4 keeps of a sequence: rows of the window, compressed entries, and the states of open windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.configs.cache_layout import CacheLayout, CacheTypes

if TYPE_CHECKING:
    from sglang.srt.configs.deepseek_v4 import DeepseekV4Config

# Tokens. Both ratios divide it, and entries and states follow whole pages, so a prefix ends at no other place.
PAGE_SIZE = 256


def deepseek_v4_layout(config: DeepseekV4Config, types: CacheTypes, num_draft_layers: int = 0) -> CacheLayout:
    """The pools of ``config``."""
    raise NotImplementedError("the pools of DeepSeek V4")

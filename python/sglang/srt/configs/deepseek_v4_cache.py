"""What compressed attention (DeepSeek V4) keeps: rows of a window, compressed entries, and what open windows need.

All of it follows the tokens' slots. A page of 256 tokens lies in contiguous slots, so an entry of m tokens has its row
at slot // m, and a compressor's states have ``ring`` rows for each page: no pool needs an allocator of its own, and
whatever a prefix that ends with a page needs lives and is freed with that page.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.configs.cache_layout import FULL, BufferSpec, CacheLayout, CacheTypes, PoolSpec

if TYPE_CHECKING:
    from sglang.srt.configs.deepseek_v4 import DeepseekV4Config

# Tokens of a page, by meaning: a multiple of every ratio and every ring.
PAGE_SIZE = 256
# Tokens per entry -> tokens that an entry is made of. At ratio 4 the window before is a part of it.
ENTRY_TOKENS = {4: 8, 128: 128}
# Tokens per entry -> rows of states for each page, without and with speculation.
RINGS = {4: (8, 16), 128: (128, 256)}


def max_step_rows(ratio: int, ring: int) -> int:
    """The rows that a step may bring for a request when it is not known how many of them will count; at least one does.

    If A tokens count, the next entry is made of tokens from A + 1 - ENTRY_TOKENS on, and of S tokens before the step
    A is at least S + 1. The row of the oldest of them, S + 2 - ENTRY_TOKENS, is not overwritten, and is written if it
    belongs to the step, where the step ends at most ``ring`` tokens behind it.
    """
    return ring - ENTRY_TOKENS[ratio] + 2


# The widest step of several rows per request that every pool of states bears with speculation.
MAX_VERIFY_ROWS = min(max_step_rows(ratio, rings[1]) for ratio, rings in RINGS.items())


def deepseek_v4_layout(config: DeepseekV4Config, types: CacheTypes, num_draft_layers: int = 0) -> CacheLayout:
    """The pools of ``config``, of which draft layers have a window alone.

    "swa": one row per token of every layer; of full length. "c4", "c128": entries; "c4_index": keys by which entries
    are chosen. "<entries>_state": the two products of a compressor in float32, ``RINGS`` rows for each page.
    """
    layers = range(config.num_hidden_layers + num_draft_layers)
    pools = [PoolSpec("swa", FULL, tuple(layers), (BufferSpec("rows", (config.head_dim,), types.kv),))]
    for name, ratio, width in (
        ("c4", 4, config.head_dim), ("c4_index", 4, config.index_head_dim), ("c128", 128, config.head_dim),
    ):  # fmt: skip
        compressed = tuple(i for i, of_layer in enumerate(config.compress_ratios) if of_layer == ratio)
        if compressed:
            columns = width * (ENTRY_TOKENS[ratio] // ratio)
            states = tuple(BufferSpec(part, (columns,), "float32") for part in ("kv", "gate"))
            ring = RINGS[ratio][num_draft_layers > 0]
            pools.append(PoolSpec(name, FULL, compressed, (BufferSpec("entries", (width,), types.kv),), ratio))
            pools.append(PoolSpec(f"{name}_state", FULL, compressed, states, PAGE_SIZE // ring))
    return CacheLayout(tuple(pools), PAGE_SIZE)

"""What compressed attention (DeepSeek V4) keeps: rows of a window, compressed entries, and what open windows need.

Entries follow the tokens' slots: a page of 256 tokens is in contiguous slots, so an entry of m tokens has its row at
slot // m. What only the tokens next to come need follows the window's slots, which a page of tokens has for a while:
the window's rows, and ``ring`` rows of a compressor's states for each page. So whatever a prefix that ends with a page
needs in addition to its entries is in one page of the window.
"""

from __future__ import annotations

from typing import Protocol

from sglang.srt.configs.cache_layout import FULL, SWA, BufferSpec, CacheLayout, CacheTypes, FieldSpec, PoolSpec

# Tokens of a page, by meaning: a multiple of every ratio and every ring.
PAGE_SIZE = 256
# Tokens per entry -> tokens that an entry is made of. At ratio 4 the window before is a part of it.
ENTRY_TOKENS = {4: 8, 128: 128}
# Columns that share a scale in 8-bit rows, and the types of such rows.
SCALE_COLUMNS = 64
PACKED_TYPES = ("float8_e4m3fn", "float8_e4m3fnuz")
# Tokens per entry -> rows of states for each page, without and with speculation.
RINGS = {4: (8, 16), 128: (128, 256)}


class CompressedSizes(Protocol):
    """What decides the pools of a model with compressed attention: ``DeepseekV4Config``."""

    @property
    def num_hidden_layers(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def qk_rope_head_dim(self) -> int: ...

    @property
    def index_head_dim(self) -> int: ...

    @property
    def compress_ratios(self) -> tuple[int, ...]: ...


def max_step_rows(ratio: int, ring: int) -> int:
    """The rows that a step may bring for a request when it is not known how many of them will count; at least one does.

    If A tokens count, the next entry is made of tokens from A + 1 - ENTRY_TOKENS on, and of S tokens before the step
    A is at least S + 1. The row of the oldest of them, S + 2 - ENTRY_TOKENS, is not overwritten, and is written if it
    belongs to the step, where the step ends at most ``ring`` tokens after it.
    """
    return ring - ENTRY_TOKENS[ratio] + 2


def packed_rows(num_rows: int, dim: int, rope_dim: int, dtype: str) -> BufferSpec:
    """A page of ``num_rows`` rows in 8 bits: the values of all rows, then their scales, then nothing.

    The values of a row are its first ``dim - rope_dim`` numbers as 8-bit floats ``dtype`` and the others as bfloat16;
    its scales are the exponents of groups of 64 of the former, filled up to a multiple of 8 bytes. A page is whole rows
    of values long. At 512 and 64: 448 + 128 + 8 bytes per row, as FlashMLA lays them out. Raises ValueError where
    bfloat16 would start at an odd byte.
    """
    plain = dim - rope_dim
    if plain % 2 or rope_dim % 2:
        raise ValueError(
            f"8-bit rows keep pairs of columns, and a head of {dim} columns, {rope_dim} of them turned, has {plain} "
            "others: use --kv-cache-dtype bfloat16"
        )
    width, scales = plain + 2 * rope_dim, -(-plain // SCALE_COLUMNS // 8) * 8
    page = -(-num_rows * (width + scales) // width) * width
    values = FieldSpec(0, (num_rows, width), dtype)
    return BufferSpec("rows", (page,), "uint8", (values, FieldSpec(num_rows * width, (num_rows, scales), "uint8")))


def packed_keys(num_rows: int, dim: int, dtype: str) -> BufferSpec:
    """A page of ``num_rows`` keys of 8-bit floats ``dtype``, then their scales in float32: 132 bytes per key of 128."""
    keys = FieldSpec(0, (num_rows, dim), dtype)
    scales = FieldSpec(num_rows * dim, (num_rows,), "float32")
    return BufferSpec("keys", (num_rows * (dim + 4),), "uint8", (keys, scales))


def _row_pool(config: CompressedSizes, types: CacheTypes, name: str, ratio: int, layers: tuple[int, ...]) -> PoolSpec:
    """One row for ``ratio`` tokens: a row of the pool each, or in 8 bits a page of them."""
    is_index, unit = name == "c4_index", SWA if name == "swa" else FULL
    dim = config.index_head_dim if is_index else config.head_dim
    if types.kv not in PACKED_TYPES:
        return PoolSpec(name, unit, layers, (BufferSpec("rows", (dim,), types.kv),), ratio)
    num_rows = PAGE_SIZE // ratio
    page = (
        packed_keys(num_rows, dim, types.kv)
        if is_index
        else packed_rows(num_rows, dim, config.qk_rope_head_dim, types.kv)
    )
    return PoolSpec(name, unit, layers, (page,), PAGE_SIZE)


def deepseek_v4_layout(config: CompressedSizes, types: CacheTypes, num_draft_tokens: int = 0) -> CacheLayout:
    """The pools of ``config``, where a verify step brings ``num_draft_tokens`` rows.

    "swa": one row per token of every layer, of the window. "c4", "c128": entries; "c4_index": keys by which entries are
    chosen; all in ``types.kv``, an 8-bit float with scales (``packed_rows``, ``packed_keys``). "<entries>_state": the
    two products of a compressor in float32, ``RINGS`` rows for each page of the window.
    """
    pools = [_row_pool(config, types, "swa", 1, tuple(range(config.num_hidden_layers)))]
    for name, ratio, width in (
        ("c4", 4, config.head_dim), ("c4_index", 4, config.index_head_dim), ("c128", 128, config.head_dim),
    ):  # fmt: skip
        compressed = tuple(i for i, of_layer in enumerate(config.compress_ratios) if of_layer == ratio)
        if compressed:
            columns = width * (ENTRY_TOKENS[ratio] // ratio)
            states = tuple(BufferSpec(part, (columns,), "float32") for part in ("kv", "gate"))
            ring = RINGS[ratio][num_draft_tokens > 0]
            pools.append(_row_pool(config, types, name, ratio, compressed))
            pools.append(PoolSpec(f"{name}_state", SWA, compressed, states, PAGE_SIZE // ring))
    return CacheLayout(tuple(pools), PAGE_SIZE)


def window_layout(config: CompressedSizes, types: CacheTypes, layer: int) -> CacheLayout:
    """The pool of a layer that has only a window."""
    return CacheLayout((_row_pool(config, types, "swa", 1, (layer,)),), PAGE_SIZE)

"""Launch shapes of the Triton attention kernels as data: tiles by architecture and kind of row, numbers of splits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sglang.kernels.launch import cdiv, next_power_of_2
from sglang.srt.platforms import current_platform


@dataclass(frozen=True)
class Tile:
    """rows: query rows of a program (heads of one token in decode); block_n: tokens of a step of its loop.

    residents: programs that share a multiprocessor, for which few requests are split.
    """

    rows: int
    block_n: int
    num_warps: int
    num_stages: int
    residents: int = 1


@dataclass(frozen=True)
class RowShape:
    """Columns of a key row as the kernels load them: MAIN, then TAIL more; both padded to powers of two of at least 16.

    ``value_is_key``: the value is the first MAIN columns of the key row.
    """

    main: int
    tail: int
    value: int
    value_is_key: bool

    @classmethod
    def of(cls, dim: int, value_dim: int, value_is_key: bool = False, k_tail: Tensor | None = None) -> RowShape:
        """Key rows of ``dim`` columns, those of ``k_tail`` [., P] included where the last ones are apart."""
        if value_is_key:
            return cls(value_dim, dim - value_dim, value_dim, True)
        if k_tail is not None:
            return cls(dim - k_tail.shape[-1], k_tail.shape[-1], value_dim, False)
        main = dim if dim == next_power_of_2(dim) else next_power_of_2(dim) // 2
        return cls(main, dim - main, value_dim, False)

    @classmethod
    def of_caches(cls, q: Tensor, v_cache: Tensor | None, rank: int) -> RowShape:
        """Key rows that q [., D] reads, with values [., Dv], or without, which are ``rank`` columns of them then."""
        return cls.of(q.shape[-1], rank if v_cache is None else v_cache.shape[-1], v_cache is None)

    @property
    def kind(self) -> str:
        """Row of the tables below: "latent", "wide" (keys past 128 columns) or "narrow"."""
        if self.value_is_key:
            return "latent"
        return "wide" if self.main > 128 else "narrow"

    def constants(self) -> dict[str, int | bool]:
        """Compile-time arguments that the kernels take."""
        return {
            "MAIN": self.main,
            "TAIL": self.tail,
            "VALUE": self.value,
            "VALUE_IS_KEY": self.value_is_key,
            "KEY": _padded(self.main),
            "BLOCK_T": _padded(self.tail),
            "BLOCK_V": _padded(self.value),
        }


def _padded(columns: int) -> int:
    return max(16, next_power_of_2(columns))


# Heads of one key head at which a program takes 64 of them as rows of its products, by architecture.
MANY_HEADS = 64

# (architecture prefix, kind of row, bytes of an element) -> tile. "" is any architecture: small tiles that fit 64 KiB
# of shared memory. sm_90 in 2 bytes: best over the shapes of attention_anchors.json on one H100 80GB, triton 3.6.0,
# 2026-11-22, except extend over latent rows, which was not timed; benchmark/kernels/tune_attention.py finds them
# again. gfx: never timed; of those that compile without a spill (triton 3.6.0 and 3.9.0, 2026-11-30) the one whose
# instructions per query and token take the fewest cycles, where a second wave on a SIMD hides half of them. Rows for 1
# byte are for 16-bit queries over an 8-bit cache, which takes registers for both; without one that for 2 serves.
DECODE_TILES: dict[tuple[str, str, int], Tile] = {
    ("", "latent", 2): Tile(16, 32, 4, 2),
    ("", "wide", 2): Tile(16, 32, 4, 2),
    ("", "narrow", 2): Tile(16, 64, 4, 2),
    ("", "latent", 4): Tile(16, 16, 8, 1),
    ("", "wide", 4): Tile(16, 16, 8, 1),
    ("", "narrow", 4): Tile(16, 32, 4, 1),
    # A second stage takes half of the 64 KiB and leaves one wave to a SIMD.
    ("gfx942", "wide", 2): Tile(16, 32, 4, 1, residents=3),
    ("gfx942", "narrow", 2): Tile(16, 64, 4, 1, residents=3),
    ("sm_90", "latent", 2): Tile(16, 64, 4, 3),
    ("sm_90", "wide", 2): Tile(16, 32, 4, 3, residents=2),
    ("sm_90", "narrow", 2): Tile(16, 64, 4, 3, residents=2),
}
MANY_HEADS_TILES: dict[tuple[str, str, int], Tile] = {
    ("", "latent", 2): Tile(32, 32, 4, 2),
    ("gfx9", "latent", 2): Tile(32, 16, 8, 1),
    ("sm_90", "latent", 2): Tile(64, 64, 8, 3),
}
EXTEND_TILES: dict[tuple[str, str, int], Tile] = {
    ("", "latent", 2): Tile(32, 32, 4, 1),
    ("", "wide", 2): Tile(128, 32, 8, 1),
    ("", "narrow", 2): Tile(128, 64, 8, 1),
    ("", "latent", 4): Tile(16, 16, 4, 1),
    ("", "wide", 4): Tile(32, 16, 8, 1),
    ("", "narrow", 4): Tile(32, 32, 8, 1),
    ("gfx9", "latent", 2): Tile(32, 16, 8, 1),
    ("gfx942", "latent", 1): Tile(32, 16, 4, 1),
    ("gfx942", "narrow", 2): Tile(128, 32, 8, 1),
    # With 32 tokens per step, rows read from an 8-bit cache spill.
    ("gfx9", "wide", 2): Tile(128, 16, 8, 1),
    ("sm_90", "latent", 2): Tile(64, 32, 8, 2),
    ("sm_90", "wide", 2): Tile(128, 64, 8, 3),
    ("sm_90", "narrow", 2): Tile(128, 64, 8, 3),
    ("sm_90", "latent", 4): Tile(16, 16, 8, 1),
}
# Multiprocessors of an H100; compute units of an MI300X and an MI355X.
MULTIPROCESSORS = {"": 128, "sm_90": 132, "gfx942": 304, "gfx950": 256}
# Bound on splits: their partial results are read again by one program.
MAX_SPLITS = 128
# Bound on the float32 partial results of one call, in bytes.
MAX_PARTS_BYTES = 256 << 20


def _find(
    table: dict[tuple[str, str, int], Tile], kind: str, dtype: torch.dtype, cache_dtype: torch.dtype
) -> Tile | None:
    """The row of the longest prefix, those for 8-bit caches before others where they apply."""
    arch = current_platform.arch
    sizes = (cache_dtype.itemsize, 2) if dtype.itemsize == 2 else (dtype.itemsize,)
    for size in sizes:
        prefixes = [p for p, of_kind, of_size in table if (of_kind, of_size) == (kind, size) and arch.startswith(p)]
        if prefixes:
            return table[max(prefixes, key=len), kind, size]
    return None


def decode_tile(shape: RowShape, group: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> tuple[Tile, bool]:
    """Tile for ``group`` query heads a key head, and whether heads are the rows of its products."""
    if group >= MANY_HEADS:
        tile = _find(MANY_HEADS_TILES, shape.kind, dtype, cache_dtype)
        if tile is not None:
            return tile, True
    tile = _find(DECODE_TILES, shape.kind, dtype, cache_dtype)
    assert tile is not None, f"no decode tile for {shape.kind} rows of {dtype}"
    return tile, False


def extend_tile(shape: RowShape, dtype: torch.dtype, cache_dtype: torch.dtype) -> Tile:
    """Tile of a packed step."""
    tile = _find(EXTEND_TILES, shape.kind, dtype, cache_dtype)
    assert tile is not None, f"no extend tile for {shape.kind} rows of {dtype}"
    return tile


def multiprocessors(arch: str) -> int:
    """Multiprocessors, or compute units, of a device of ``arch``."""
    return MULTIPROCESSORS[max((prefix for prefix in MULTIPROCESSORS if arch.startswith(prefix)), key=len)]


def split_count(programs: int, max_tokens: int, tile: Tile, part_bytes: int, min_blocks: int = 1) -> int:
    """Splits of each context so that ``programs`` of them fill the GPU; depends on shapes alone, never on lengths.

    max_tokens: the longest context there can be, cut into no fewer than ``min_blocks`` blocks a split. part_bytes:
    float32 results of one split of the whole batch.
    """
    wanted = multiprocessors(current_platform.arch) * tile.residents // max(programs, 1)
    blocks = cdiv(max_tokens, tile.block_n * min_blocks)
    return max(1, min(wanted, blocks, MAX_SPLITS, MAX_PARTS_BYTES // max(part_bytes, 1)))

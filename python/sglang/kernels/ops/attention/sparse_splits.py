"""How sparse attention runs: passes, programs that share the rows of a query, and tiles; data by architecture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from sglang.kernels.launch import cdiv
from sglang.kernels.ops.attention.tiles import MAX_PARTS_BYTES, multiprocessors
from sglang.srt.platforms import current_platform

ANY = (0, 1 << 31)


@dataclass(frozen=True)
class Range:
    """Shapes (Q rows of the step, heads on this rank, K rows that each attends to), bounds included."""

    q: tuple[int, int] = ANY
    heads: tuple[int, int] = ANY
    k: tuple[int, int] = ANY

    def holds(self, q: int, heads: int, k: int) -> bool:
        """True for a shape within all bounds."""
        sizes = ((q, self.q), (heads, self.heads), (k, self.k))
        return all(low <= size <= high for size, (low, high) in sizes)


@dataclass(frozen=True)
class SparseTile:
    """heads: of a program, all of one row; block_n: rows that it reads at once.

    kpack: how many operands of a product a lane of CDNA3 reads at once, 0 elsewhere. With 2, triton 3.6.0 compiles a
    product of 16 columns wrongly where it adds to another (latent attention with a tail of 16); the logits here do not.
    """

    heads: int
    block_n: int
    num_warps: int
    num_stages: int
    kpack: int = 0


@dataclass(frozen=True)
class Pass:
    """heads: of a program, all of one row; block: rows that it reads at once; columns: of results."""

    heads: int
    block: int
    columns: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Passes:
    """The tiles of both: of logits, whose columns are rows, and of values."""

    logits: Pass
    values: Pass


MOST = ANY[1]
FEW_HEADS, MANY_HEADS = (0, 64), (65, MOST)
# Shapes that one program per row and block of heads serves best, by architecture. gfx950: as upstream measured them on
# an MI355X (sglang PR 26383); not measured here.
NO_SPLIT: dict[str, tuple[Range, ...]] = {
    "gfx950": (Range(q=(1024, MOST)), Range(q=(256, MOST), heads=MANY_HEADS, k=(200, MOST)))
}
# Shapes whose rows are dealt to several programs; looked at after the table above.
SPLIT: dict[str, tuple[Range, ...]] = {
    "gfx950": (
        Range(q=(0, 4)),
        Range(q=(0, 256), heads=FEW_HEADS, k=(0, 800)),
        Range(heads=FEW_HEADS, k=(801, 1023)),
        Range(q=(0, 128), heads=FEW_HEADS, k=(1024, MOST)),
        Range(q=(0, 128), heads=MANY_HEADS, k=(0, 399)),
        Range(q=(0, 32), heads=MANY_HEADS, k=(400, MOST)),
    )
}
# To how many, the first that holds; 1 where none does.
SPLITS: dict[str, tuple[tuple[Range, int], ...]] = {
    "gfx950": (
        (Range(q=(0, 4), heads=(128, MOST), k=(512, MOST)), 8),
        (Range(q=(0, 4), k=(1024, MOST)), 8),
        (Range(q=(0, 8), heads=(128, MOST)), 4),
        (Range(q=(0, 8), k=(1024, MOST)), 4),
        (Range(q=(9, 128), heads=FEW_HEADS, k=(1024, MOST)), 2),
        (Range(q=(65, MOST), k=(8192, MOST)), 4),
        (Range(q=(65, MOST), k=(2048, MOST)), 2),
        (Range(q=(9, MOST), heads=MANY_HEADS, k=(512, MOST)), 4),
        (Range(q=(9, MOST), heads=MANY_HEADS, k=(256, MOST)), 2),
    )
}
# Most programs that share the rows of one query, and the fewest blocks of rows that each has, by architecture prefix.
MAX_SPLITS, MIN_BLOCKS = 16, {"": 2, "sm_90": 1}


def wants_no_split(arch: str, q: int, heads: int, k: int) -> bool | None:
    """Whether the table of ``arch`` wants no split for this shape; None where it has none."""
    return any(one.holds(q, heads, k) for one in NO_SPLIT[arch]) if arch in NO_SPLIT else None


def wants_split(arch: str, q: int, heads: int, k: int) -> bool | None:
    """Whether it wants a split for a shape that ``wants_no_split`` leaves; None where there is no table."""
    return any(one.holds(q, heads, k) for one in SPLIT[arch]) if arch in SPLIT else None


# (architecture prefix, bytes of a query's element) -> tiles, most heads first; a program takes the first that is no
# larger than the heads there are, else the last. "" is any architecture: within 64 KiB of shared memory. gfx: compiled
# without a spill (triton 3.6.0 and 3.9.0), never timed; on gfx942 reading one operand at a time takes 16 registers for
# addresses, which spill. sm_90: 64 and 128 heads of 640 rows, 1 to 4096 queries, on one H200, triton 3.6.0,
# 2026-11-29, benchmark/kernels/bench_sparse_attention.py --tune; its tile of 32 heads was not timed.
TILES: dict[tuple[str, int], tuple[SparseTile, ...]] = {
    ("", 2): (SparseTile(64, 16, 8, 1), SparseTile(32, 16, 4, 1), SparseTile(16, 32, 4, 1)),
    ("", 4): (SparseTile(16, 16, 4, 1),),
    ("gfx942", 2): (SparseTile(64, 16, 8, 1, kpack=2), SparseTile(32, 16, 4, 1), SparseTile(16, 32, 4, 1)),
    ("sm_90", 2): (SparseTile(64, 64, 8, 1), SparseTile(32, 32, 4, 2), SparseTile(16, 64, 8, 1)),
}
# Of 8-bit rows, shapes that two passes serve best: logits of blocks of rows with their weights, then sums of values.
# sm_90: 64 and 128 heads of 192, 640 and 1152 rows, 32 to 4096 queries, on one H200, triton 3.6.0, 2026-11-30. A window
# of 128 rows and 64 entries would leave half of a block of 128 entries empty.
_LOGITS, _FEW = Pass(64, 128, 512, num_warps=4, num_stages=4), Pass(64, 64, 512, num_warps=4, num_stages=3)
_SOME_HEADS, _ALL_HEADS = Range(q=(64, MOST), heads=(64, 127)), Range(q=(32, MOST), heads=(128, MOST))
PASSES: dict[str, tuple[tuple[Range, Passes], ...]] = {
    "sm_90": (
        (replace(_SOME_HEADS, k=(0, 192)), Passes(_FEW, Pass(64, 32, 256, num_warps=4, num_stages=6))),
        (replace(_ALL_HEADS, k=(0, 192)), Passes(_FEW, Pass(64, 64, 256, num_warps=4, num_stages=6))),
        (_SOME_HEADS, Passes(_LOGITS, Pass(64, 64, 256, num_warps=4, num_stages=5))),
        (_ALL_HEADS, Passes(_LOGITS, Pass(64, 32, 256, num_warps=4, num_stages=5))),
    )
}
# Architectures whose smallest tile serves a step better while its programs all run at once.
SPREADS_HEADS = ("sm_90",)


def _longest(prefixes: Iterable[str], arch: str) -> str:
    return max(filter(arch.startswith, prefixes), key=len)


def sparse_tile(q: int, heads: int, itemsize: int = 2, arch: str | None = None) -> SparseTile:
    """The tile for q rows of a step, ``heads`` on this rank, and queries of ``itemsize`` bytes."""
    arch = current_platform.arch if arch is None else arch
    prefix = _longest((p for p, size in TILES if size == itemsize), arch)
    fitting = TILES[prefix, itemsize]
    if prefix in SPREADS_HEADS and q * cdiv(heads, fitting[-1].heads) <= multiprocessors(arch):
        return fitting[-1]
    return next((tile for tile in fitting if tile.heads <= heads), fitting[-1])


def choose_passes(q: int, heads: int, k: int, arch: str | None = None) -> Passes | None:
    """The tiles of both passes for a shape that they serve best; None where one pass does."""
    arch = current_platform.arch if arch is None else arch
    return next((passes for shape, passes in PASSES.get(arch, ()) if shape.holds(q, heads, k)), None)


def split_count(
    q: int, heads: int, k: int, dim: int = 512, tile: SparseTile | None = None, arch: str | None = None
) -> int:
    """Programs that share the rows of one query: by shapes alone, so that capture and replay choose alike.

    q rows of the step, ``heads`` on this rank, k rows that each may attend to, of ``dim`` columns. Where the
    architecture has no table, as many as fill it.
    """
    arch = current_platform.arch if arch is None else arch
    tile = sparse_tile(q, heads, arch=arch) if tile is None else tile
    blocks = max(1, cdiv(k, tile.block_n))
    if arch not in SPLIT:
        wanted = multiprocessors(arch) // max(q * cdiv(heads, tile.heads), 1)
        fits = MAX_PARTS_BYTES // max(4 * q * heads * dim, 1)
        return max(1, min(wanted, cdiv(blocks, MIN_BLOCKS[_longest(MIN_BLOCKS, arch)]), MAX_SPLITS, fits))
    if wants_no_split(arch, q, heads, k) or not wants_split(arch, q, heads, k):
        return 1
    return min(blocks, next((count for shape, count in SPLITS[arch] if shape.holds(q, heads, k)), 1))

"""The cache layout of a model: pools of rows, each with a fixed ratio to one allocated unit.

Plain data, made by a model's config. The sizes of pools, the memory plan, the creation of the pools and the check of
captured steps derive from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

# The units that are ever allocated: a token of a sequence, a token within a sliding window, and a slot of a sequence.
FULL, SWA, STATE = "full", "swa", "state"
# Pages of a window's pools that are never handed out: the first is the dummy, the rows of the other are NaN, which is
# the rows of tokens whose window page was freed.
TOMBSTONE_PAGE, WINDOW_DUMMY_PAGES = 1, 2

_ITEM_BYTES = {
    "float64": 8, "int64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e4m3fnuz": 1,
    "uint8": 1,
}  # fmt: skip


@dataclass(frozen=True)
class CacheTypes:
    """Element types of what is kept, by torch's names.

    kv: keys, values and latents. conv: inputs that a convolution looks back on. state: recurrent states; None takes
    what the checkpoint names. inputs: rows that a recurrent layer will run again, in the dtype of activations.
    """

    kv: str = "float32"
    conv: str = "float32"
    state: str | None = None
    inputs: str = "float32"


PLAIN_TYPES = CacheTypes()


@dataclass(frozen=True)
class FieldSpec:
    """A part of a row of bytes: the byte that it starts at, its shape, and its element type by torch's name."""

    start: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Bytes of the part."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class BufferSpec:
    """One buffer of a pool: the shape of a row of one layer, and its element type by torch's name.

    fields: the parts of a row of bytes that packs several rows of what is kept, all of as many rows.
    """

    name: str
    row_shape: tuple[int, ...]
    dtype: str
    fields: tuple[FieldSpec, ...] = ()


@dataclass(frozen=True)
class PoolSpec:
    """Buffers of some layers whose rows follow ``unit``: slot s of the unit has its row at s // units_per_row.

    Plain keys and values have one row per token. A cache that keeps one row for each m tokens, or whole pages of m
    tokens as bytes, has ``units_per_row`` m, and needs no allocator of its own. Where a page of slots shares a ring of
    rows, the page has the rows that this says; which of them a slot takes is the pool's own matter.
    """

    name: str
    unit: str
    layer_ids: tuple[int, ...]
    buffers: tuple[BufferSpec, ...]
    units_per_row: int = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all layers and buffers."""
        one_layer = sum(math.prod(buffer.row_shape) * _ITEM_BYTES[buffer.dtype] for buffer in self.buffers)
        return len(self.layer_ids) * one_layer

    @property
    def packed_rows(self) -> int:
        """Rows of what is kept that one row of the pool packs."""
        packed = [field.shape[0] for buffer in self.buffers for field in buffer.fields]
        return packed[0] if packed else 1


@dataclass(frozen=True)
class CacheLayout:
    """All pools of a model on one rank.

    ``page_size``, in tokens, is the only one whose ends are ends of whole rows in all pools; None: any will do.
    """

    pools: tuple[PoolSpec, ...]
    page_size: int | None = None

    def has(self, unit: str) -> bool:
        """True when some pool follows ``unit``."""
        return any(pool.unit == unit for pool in self.pools)

    @property
    def units(self) -> tuple[str, ...]:
        """The units that the pools follow, each once."""
        return tuple(dict.fromkeys(pool.unit for pool in self.pools))

    def num_bytes(self, unit: str, num_units: int) -> int:
        """Bytes that ``num_units`` of a unit take in all pools that follow it; whole rows of each of them."""
        uneven = [pool.name for pool in self.pools if pool.unit == unit and num_units % pool.units_per_row]
        if uneven:
            raise ValueError(f"{num_units} units {unit!r} are no whole rows of {', '.join(uneven)}")
        return sum(num_units // pool.units_per_row * pool.row_bytes for pool in self.pools if pool.unit == unit)


def join(layouts: Iterable[CacheLayout]) -> CacheLayout:
    """Layouts on one rank (models, draft layers) as one; pools that differ only in their layers become one pool."""
    parts = list(layouts)
    sizes = {layout.page_size for layout in parts if layout.page_size is not None}
    if len(sizes) > 1:
        raise ValueError(f"models that need pages of {sorted(sizes)} tokens cannot share pools")
    layers: dict[PoolSpec, tuple[int, ...]] = {}
    for pool in (pool for layout in parts for pool in layout.pools):
        alike = replace(pool, layer_ids=())
        layers[alike] = layers.get(alike, ()) + pool.layer_ids
    return CacheLayout(tuple(replace(alike, layer_ids=ids) for alike, ids in layers.items()), *sizes)


def dummy_units(unit: str, page_size: int) -> int:
    """How many of a unit are before the first that is handed out: for padded rows a page of tokens or a state slot, and
    in a window the tombstones' page."""
    if unit == STATE:
        return 1
    return page_size * (WINDOW_DUMMY_PAGES if unit == SWA else 1)

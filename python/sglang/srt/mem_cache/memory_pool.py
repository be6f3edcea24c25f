"""Device memory of served sequences: the pools of a model's cache layout, addressed by slot, and its state slots."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from sglang.srt.configs.cache_layout import (
    FULL,
    STATE,
    SWA,
    TOMBSTONE_PAGE,
    WINDOW_DUMMY_PAGES,
    CacheLayout,
    FieldSpec,
    PoolSpec,
    dummy_units,
)
from sglang.srt.mem_cache.slot_list import SlotList


class CachePool:
    """Buffers [layers, ``num_rows``, ...] of one pool, dummies included; zero at first, so that dummies are finite."""

    def __init__(self, spec: PoolSpec, num_rows: int, device: torch.device | str):
        if len(set(spec.layer_ids)) != len(spec.layer_ids):
            raise ValueError(f"layer ids of pool {spec.name!r} must differ, got {spec.layer_ids}")
        self.spec = spec
        self.num_rows = num_rows
        self._buffers = tuple(
            torch.zeros((len(spec.layer_ids), num_rows, *one.row_shape), dtype=getattr(torch, one.dtype), device=device)
            for one in spec.buffers
        )
        self._layers = {
            layer_id: tuple(
                view
                for buffer, one in zip(self._buffers, spec.buffers, strict=True)
                for view in _views(buffer[i], one.fields)
            )
            for i, layer_id in enumerate(spec.layer_ids)
        }

    def buffers(self) -> tuple[torch.Tensor, ...]:
        """The whole buffers, in the order of the spec."""
        return self._buffers

    def layer(self, layer_id: int) -> tuple[torch.Tensor, ...]:
        """Views of a layer's buffers [rows, ...], or of their packed fields. Raises KeyError for another layer."""
        try:
            return self._layers[layer_id]
        except KeyError:
            held = f"holds layers {self.spec.layer_ids}, not layer {layer_id}"
            raise KeyError(f"pool {self.spec.name!r} {held}") from None


def _views(rows: torch.Tensor, fields: tuple[FieldSpec, ...]) -> Iterator[torch.Tensor]:
    """The rows, or their parts: views of bytes [rows, bytes]."""
    if not fields:
        yield rows
    for field in fields:
        part = rows[:, field.start : field.start + field.num_bytes]
        yield part.view(getattr(torch, field.dtype)).unflatten(1, field.shape)


class ModelPools:
    """Every pool of a model on one rank, by name; sizes: usable units of each kind, after the dummies."""

    def __init__(self, layout: CacheLayout, sizes: Mapping[str, int], page_size: int, device: torch.device | str):
        self.layout = layout
        self.page_size = page_size
        self.device = torch.device(device)
        self._sizes = {unit: sizes[unit] for unit in layout.units}
        self._pools: dict[str, CachePool] = {}
        for spec in layout.pools:
            self._pools[spec.name] = CachePool(spec, self.rows_of(spec, self._sizes[spec.unit]), device)
        self.mark_tombstones()

    def __getitem__(self, name: str) -> CachePool:
        try:
            return self._pools[name]
        except KeyError:
            raise KeyError(f"the model keeps no pool {name!r}, it keeps {', '.join(self._pools)}") from None

    def __iter__(self) -> Iterator[CachePool]:
        return iter(self._pools.values())

    def size(self, unit: str = FULL) -> int:
        """How many of a unit can be handed out; 0 for a unit of no pool."""
        return self._sizes.get(unit, 0)

    def rows_of(self, spec: PoolSpec, num_units: int) -> int:
        """Rows of a pool up to the last of the first ``num_units`` of its unit, the dummies among them."""
        units = num_units + dummy_units(spec.unit, self.page_size)
        if units % spec.units_per_row:
            raise ValueError(f"{units} units {spec.unit!r} are no whole rows of pool {spec.name!r}")
        return units // spec.units_per_row

    def mark_tombstones(self) -> None:
        """Fill the window page of tombstones, so that values read from it are not finite."""
        self.fill_window_page(TOMBSTONE_PAGE)

    def fill_window_page(self, page: int) -> None:
        """Fill a page of the window with NaN; bytes with ones, which are NaN or invalid in every packed format."""
        for pool in self:
            if pool.spec.unit == SWA:
                rows = self.page_size // pool.spec.units_per_row
                for buffer in pool.buffers():
                    part = buffer[:, page * rows : (page + 1) * rows]
                    part.fill_(torch.nan if buffer.is_floating_point() else 0xFF)

    def poison_windows(self) -> None:
        """Fill every page of the window, except the dummy, like a tombstone's, while no page is in use."""
        for page in range(TOMBSTONE_PAGE, WINDOW_DUMMY_PAGES + self.size(SWA) // self.page_size):
            self.fill_window_page(page)

    def buffers(self, unit: str | None = None) -> tuple[torch.Tensor, ...]:
        """All buffers of all pools, or of the pools of ``unit``."""
        return tuple(buffer for pool in self if unit in (None, pool.spec.unit) for buffer in pool.buffers())


class StateSlots(SlotList):
    """Allocator of the state slots 1 .. size, lowest first; slot 0 is the dummy. All state pools share them."""

    def __init__(self, *pools: ModelPools):
        sizes = {each.size(STATE) for each in pools if each.layout.has(STATE)}
        if len(sizes) != 1 or min(sizes) < 1:
            raise ValueError(f"state slots need pools of one size, at least one slot, got {sorted(sizes)}")
        self._buffers = [buffer for each in pools for buffer in each.buffers(STATE)]
        super().__init__("state slot", 1, sizes.pop())

    def alloc(self, zero: bool = True) -> int | None:
        """A slot, or None when all are taken; its state is zero unless the caller is about to overwrite it."""
        slot = super().alloc()
        if slot is not None and zero:
            for buffer in self._buffers:
                buffer[:, slot].zero_()
        return slot

    def copy(self, src: int, dst: int) -> None:
        """Copy the state of slot ``src`` over that of slot ``dst``, all layers."""
        self.check(src)
        self.check(dst)
        for buffer in self._buffers:
            buffer[:, dst] = buffer[:, src]

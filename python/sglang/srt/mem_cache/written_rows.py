"""The rows that a step may write, as the proof of captured steps fills, compares and clears them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sglang.srt.configs.cache_layout import dummy_units
from sglang.srt.mem_cache.memory_pool import ModelPools

# Bytes of pool memory that are fingerprinted at once.
_CHUNK_BYTES = 1 << 24
# Packed bytes below this are small numbers, and finite, as 8-bit and wider floats and as exponents.
_BYTE_LIMIT = 0x40


class WrittenRows:
    """Rows of every pool up to the last of the first ``limits[unit]`` units, the dummies among them."""

    def __init__(self, pools: ModelPools, limits: Mapping[str, int]) -> None:
        # Each buffer [layers, rows, ...], and its first row that is no dummy.
        self._views: list[tuple[torch.Tensor, int]] = []
        self._pools = pools
        for pool in pools:
            spec = pool.spec
            rows, first = pools.rows_of(spec, limits[spec.unit]), dummy_units(spec.unit, pools.page_size)
            for buffer in pool.buffers():
                self._views.append((buffer.narrow(1, 0, rows), first // spec.units_per_row))

    def poison(self, seed: int) -> None:
        """The same numbers for the same seed: about unit normal, large where only padding reads."""
        for buffer, _ in self._views:
            generator = torch.Generator(device=buffer.device).manual_seed(seed)
            for layer in buffer:  # one at a time: the numbers are drawn in float32
                if layer.is_floating_point():
                    layer.copy_(torch.randn(layer.shape, generator=generator, device=layer.device))
                else:
                    layer.random_(0, _BYTE_LIMIT, generator=generator)
            most = min(1e3, torch.finfo(buffer.dtype).max) if buffer.is_floating_point() else _BYTE_LIMIT
            buffer[:, 0].fill_(most)

    def fingerprints(self) -> list[torch.Tensor]:
        """For each buffer, one integer per row past the dummies that changes when any bit of the row does."""
        return [fingerprint(buffer, first) for buffer, first in self._views]

    def clear(self) -> None:
        """Zero all of it, and mark tombstones, as it was made."""
        for buffer, _ in self._views:
            buffer.zero_()
        self._pools.mark_tombstones()


def fingerprint(buffer: torch.Tensor, first: int) -> torch.Tensor:
    """buffer [layers, rows, ...] -> [rows - first] int64: a weighted sum of each row's bits, modulo 2**64."""
    slots = buffer.transpose(0, 1)[first:]
    step = max(1, _CHUNK_BYTES // max(1, slots[0].nbytes)) if slots.shape[0] else 1
    sums = []
    for start in range(0, slots.shape[0], step):
        rows = slots[start : start + step]
        bits = rows.reshape(rows.shape[0], -1).contiguous().view(torch.uint8).to(torch.int64)
        weights = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 2_654_435_761
        sums.append((bits * weights).sum(dim=1))
    return torch.cat(sums) if sums else torch.empty(0, dtype=torch.int64, device=slots.device)

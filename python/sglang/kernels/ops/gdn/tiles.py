"""Launch shapes of the gated-delta-net kernels as data, by architecture and by how many programs a step has."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.kernels.launch import next_power_of_2
from sglang.kernels.ops.gdn.shapes import GDNShape
from sglang.srt.platforms import current_platform


@dataclass(frozen=True)
class Tile:
    """rows: of a state, those that a program of the decode step holds at once, or that one of the scan carries on."""

    rows: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GDNTiles:
    """One architecture's choices.

    scan: pairs of the largest number of state rows in the batch (sequences * HV * V) and the tile up to it, ascending.
    lanes: threads of a warp. inverse_precision: of products inside a chunk's inverse where it is rounded to 16 bits
    next. solve_registers: most registers a thread may take to solve a chunk, None for the compiler's choice.
    """

    decode: Tile
    scan: tuple[tuple[int, Tile], ...]
    lanes: int
    inverse_precision: str
    solve_registers: int | None

    def decode_tile(self, shape: GDNShape) -> Tile:
        """The tile of a decode batch."""
        return Tile(min(self.decode.rows, next_power_of_2(shape.v_dim)), self.decode.num_warps, self.decode.num_stages)

    def scan_tile(self, shape: GDNShape, sequences: int, dtype: torch.dtype) -> Tile:
        """The tile of an extend batch; float32 operands leave no room for a second stage."""
        state_rows = sequences * shape.value_heads * shape.v_dim
        tile = next(tile for most, tile in self.scan if state_rows <= most)
        rows = max(16, min(tile.rows, next_power_of_2(shape.v_dim)))
        return Tile(rows, tile.num_warps, tile.num_stages if dtype.itemsize == 2 else 1)


ANY = 1 << 62

# By prefix of the architecture, the first that fits. sm_90 was measured on one H100 80GB (triton 3.6.0, 2026-11-22,
# benchmark/kernels/bench_gdn.py); the others take little shared memory and were not. CDNA's matrix units take float32
# as it is.
TILES = {
    "sm_90": GDNTiles(
        decode=Tile(64, 8, 3),
        scan=((4096, Tile(32, 4, 3)), (8192, Tile(64, 4, 2)), (ANY, Tile(64, 4, 1))),
        lanes=32,
        inverse_precision="tf32",
        solve_registers=168,
    ),
    "sm_": GDNTiles(
        decode=Tile(32, 4, 3),
        scan=((4096, Tile(32, 4, 1)), (ANY, Tile(64, 4, 1))),
        lanes=32,
        inverse_precision="tf32",
        solve_registers=None,
    ),
    "": GDNTiles(
        decode=Tile(32, 4, 2),
        scan=((4096, Tile(16, 4, 1)), (ANY, Tile(64, 4, 1))),
        lanes=64,
        inverse_precision="ieee",
        solve_registers=None,
    ),
}


def gdn_tiles() -> GDNTiles:
    """The choices of the current platform."""
    arch = current_platform.arch
    return next(tiles for prefix, tiles in TILES.items() if arch.startswith(prefix))

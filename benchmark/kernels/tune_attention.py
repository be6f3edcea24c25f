"""Find the tiles of the attention kernels on the local GPU; the answer goes into kernels/ops/attention/tiles.py.

    python benchmark/kernels/tune_attention.py [--only mla_h128 mla_h16] [--shapes 1x8192 128x8192] [--jobs 12]

Every candidate is compiled first, side by side in processes of their own; one that does not fit the GPU is left out
and named. Times are those of replayed graphs on cold rows; a row's last column is its worst case over the best found.
"""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch
from attention_cases import DECODE_LAYOUTS, DECODE_SHAPES, EXTEND_LAYOUTS, EXTEND_SHAPES, decode_case, extend_case
from timing import Timed, describe_device, graph_time

from sglang.kernels.ops.attention.tiles import Tile

# With slots to look up, 5 stages keep three blocks of rows in shared memory, 3 and 4 stages two.
DECODE_TILES: dict[str, tuple[Tile, ...]] = {
    "mla_h16": (
        Tile(16, 64, 4, 2), Tile(16, 64, 4, 3), Tile(16, 32, 4, 5), Tile(16, 32, 4, 5, 2), Tile(16, 32, 8, 5, 2),
    ),
    "mla_h128": (Tile(64, 64, 8, 2), Tile(64, 64, 8, 3), Tile(64, 32, 8, 3), Tile(64, 32, 8, 5)),
    "gqa_16x2_d256": (
        Tile(16, 64, 4, 3), Tile(16, 32, 4, 3, 2), Tile(16, 32, 4, 5, 2), Tile(16, 32, 4, 7), Tile(16, 32, 4, 3, 3),
    ),
    "gqa_32x8_d128": (
        Tile(16, 64, 4, 3, 2), Tile(16, 64, 4, 5, 2), Tile(16, 64, 4, 3, 3), Tile(16, 32, 4, 5, 3), Tile(16, 128, 8, 3),
    ),
}  # fmt: skip
EXTEND_TILES: dict[str, tuple[Tile, ...]] = {
    "mha_h16_192_128": (Tile(128, 64, 8, 2), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 128, 8, 2)),
    "gqa_16x2_d256": (Tile(128, 64, 8, 3), Tile(128, 32, 8, 5), Tile(128, 64, 8, 4), Tile(64, 64, 4, 2)),
}
Job = tuple[str, str, int, int, Tile]


def run_once(job: Job) -> str | None:
    """Compile and run a candidate; why it cannot, if so."""
    try:
        for call in make(job).calls[:1]:
            call()
        torch.cuda.synchronize()
    except Exception as error:  # a candidate that fails is left out and named
        return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return None


def make(job: Job) -> Timed:
    kind, layout, batch, tokens, tile = job
    if kind == "decode":
        return decode_case(layout, batch, tokens, tile=tile)
    return extend_case(layout, batch, tokens, tile=tile)


def tune(kind: str, layout: str, tiles: tuple[Tile, ...], shapes: list[tuple[int, int]]) -> None:
    """Time every tile at every shape and print them, best first."""
    figures: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    for batch, tokens in shapes:
        for tile in tiles:
            case = make((kind, layout, batch, tokens, tile))
            figures[tile].append(min(graph_time(case.calls, runs=2, min_seconds=0.005)) * 1e6)
            del case
        torch.cuda.empty_cache()
    best = [min(figures[tile][i] for tile in tiles) for i in range(len(shapes))]
    print(f"{kind} {layout}: us at " + ", ".join(f"{batch}x{tokens}" for batch, tokens in shapes))
    worst = {tile: max(time / least for time, least in zip(times, best)) for tile, times in figures.items()}
    for tile in sorted(tiles, key=worst.__getitem__):
        print(f"  {str(tile):<84} " + " ".join(f"{time:8.1f}" for time in figures[tile]) + f"  {worst[tile]:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layouts = list(dict.fromkeys([*DECODE_LAYOUTS, *EXTEND_LAYOUTS]))
    parser.add_argument("--only", nargs="+", choices=layouts, default=layouts)
    parser.add_argument("--shapes", nargs="+", help="requests x tokens, default those of the anchor table")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    args = parser.parse_args()
    asked = {(int(batch), int(tokens)) for batch, tokens in (shape.split("x") for shape in args.shapes or ())}
    plans = [("decode", layout, tiles, DECODE_SHAPES) for layout, tiles in DECODE_TILES.items() if layout in args.only]
    plans += [("extend", layout, tiles, EXTEND_SHAPES) for layout, tiles in EXTEND_TILES.items() if layout in args.only]
    jobs: list[Job] = [
        (kind, layout, batch, 256, tile) for kind, layout, tiles, _ in plans for tile in tiles for batch in (1, 300)
    ]
    print(f"# {describe_device()}")
    failed = set()
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for job, reason in zip(jobs, pool.map(run_once, jobs)):
            if reason is not None:
                print(f"left out: {job[1]} {job[4]}: {reason}")
                failed.add((job[1], job[4]))
    for kind, layout, tiles, shapes in plans:
        chosen = [shape for shape in shapes if not asked or shape in asked]
        tune(kind, layout, tuple(tile for tile in tiles if (layout, tile) not in failed), chosen)


if __name__ == "__main__":
    main()

"""Find tiles of the 8-bit linear kernels on the local GPU, for the tables in ``kernels/ops/quant/group_fp8.py``.

    python benchmark/kernels/tune_linear.py [--rows 1 8 32 128 1024 8192] [--jobs 12] [--best 3]

Projections of DeepSeek-V3. Rows are quantised beforehand. Times of replayed graphs, weights cold (each replay cycles
through copies that together exceed the cache). cuBLAS' own product with such scales is timed too, where torch has it.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import describe_device, graph_time

from sglang.kernels.launch import cdiv
from sglang.kernels.ops.quant.group_fp8 import GROUP, block_product, fp8_dtype, quantize_groups_triton
from sglang.srt.platforms import current_platform
from sglang.test.amd_gate.driver import compile_only

# (outputs, inputs): q_a + kv_a, q_b, o_proj, shared gate_up, shared down, dense gate_up and down.
SHAPES = ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048), (36864, 7168), (7168, 18432))
COLD_BYTES = 120 << 20
Tile = tuple[tuple[str, int], ...]


def candidates(rows: int) -> list[Tile]:
    """Tiles of the kernels for one row, for few rows and for any number of rows."""
    found: list[Tile] = []
    if rows == 1:
        for n, k, warps in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048), (1, 2, 4, 8)):
            if 16 <= n * k // (32 * warps) <= 128:
                found.append((("BLOCK_N", n), ("BLOCK_K", k), ("num_warps", warps)))
    if rows <= 32:
        m = 16 if rows <= 16 else 32
        for n, groups, warps, stages in itertools.product((16, 32, 64), (2, 4, 8, 16), (2, 4, 8), (2, 3, 4)):
            fits = stages * groups * GROUP * (m + n) <= 200 << 10 and groups * m * n // (32 * warps) <= 128
            if fits and groups * n >= 32:
                found.append(
                    (("BLOCK_M", m), ("BLOCK_N", n), ("GROUPS", groups), ("num_warps", warps), ("num_stages", stages))
                )
    sizes = (16,) if rows <= 16 else (16, 32, 64) if rows <= 64 else (64, 128)
    for m, n, warps, stages in itertools.product(sizes, (16, 32, 64, 128), (4, 8), (3, 4, 5, 6)):
        held, flight = m * n // (32 * warps), stages * GROUP * (m + n)
        if held > 128 or flight > 200 << 10 or (m >= 64 and n < 64):
            continue
        found.append(
            (("BLOCK_M", m), ("BLOCK_N", n), ("BLOCK_K", GROUP), ("GROUP_M", 16 if rows > 1024 else 1),
             ("num_warps", warps), ("num_stages", stages))
        )  # fmt: skip
    return found


def make(rows: int, width: int, k: int, device: str, arch: str) -> tuple[torch.Tensor, ...]:
    dtype = fp8_dtype(arch)
    if device == "meta":
        shapes = ((rows, k), (rows, k // GROUP), (width, k), (cdiv(width, GROUP), k // GROUP))
        dtypes = (dtype, torch.float32, dtype, torch.float32)
        return tuple(torch.empty(shape, dtype=kind, device=device) for shape, kind in zip(shapes, dtypes))
    q, scale = quantize_groups_triton(torch.randn(rows, k, device=device, dtype=torch.bfloat16), dtype)
    w = torch.randn(width, k, device=device).mul_(16).to(dtype)
    return q, scale, w, torch.rand(cdiv(width, GROUP), k // GROUP, device=device)


def _compile(job: tuple[str, int, Tile]) -> str | None:
    arch, rows, tile = job
    try:
        with compile_only(arch):
            q, scale, w, w_scale = make(rows, *SHAPES[0], "meta", arch)
            block_product(q, scale, w, w_scale, torch.bfloat16, dict(tile))
    except Exception as error:  # a candidate that does not compile is left out
        return f"{type(error).__name__}"
    return None


def cublas(q: torch.Tensor, scale: torch.Tensor, w: torch.Tensor, w_scale: torch.Tensor) -> Callable[[], Any] | None:
    """The library's product as a call; None where this torch or shape has none."""
    try:
        from torch.nn.functional import ScalingType, scaled_mm

        a_scale = scale.t().contiguous().t()

        def call() -> torch.Tensor:
            return scaled_mm(
                q, w.t(), a_scale, ScalingType.BlockWise1x128, w_scale.t(), ScalingType.BlockWise128x128,
                output_dtype=torch.bfloat16,
            )  # fmt: skip

        call()
    except Exception as error:  # the library has its own limits; the reason is printed
        print(f"  cuBLAS: {type(error).__name__}: {str(error).splitlines()[0][:150]}")
        return None
    return call


def tune(rows: int, tiles: list[Tile], best: int, arch: str) -> None:
    totals: dict[Tile, float] = defaultdict(float)
    for width, k in SHAPES:
        copies = max(1, min(6, COLD_BYTES // (width * k)))
        inputs = [make(rows, width, k, "cuda", arch) for _ in range(copies)]
        times: dict[Tile, float] = {}
        for tile in tiles:
            try:
                calls = [
                    partial(block_product, q, scale, w, w_scale, torch.bfloat16, dict(tile))
                    for q, scale, w, w_scale in inputs
                ]
                times[tile] = min(graph_time(calls, runs=2, min_seconds=0.003)) * 1e6
            except Exception:  # out of shared memory shows only at launch
                times[tile] = float("inf")
            totals[tile] += times[tile]
        floor = width * k / 3.02e6
        flops = 2 * rows * width * k / 1e6
        library = [cublas(*x) for x in inputs]
        if all(library):
            took = min(graph_time([call for call in library if call], runs=2, min_seconds=0.003)) * 1e6
            print(f"t{rows} {width}x{k}: cuBLAS {took:.1f} us, {flops / took:.0f} TFLOP/s")
        for tile in sorted(times, key=times.__getitem__)[:best]:
            took = times[tile]
            rate = f"{took / floor:.2f}x bytes, {flops / took:.0f} TFLOP/s"
            print(f"t{rows} {width}x{k}: {took:8.1f} us ({rate}) {dict(tile)}")
    for tile in sorted(totals, key=totals.__getitem__)[:best]:
        print(f"t{rows} all shapes: {totals[tile]:8.1f} us {dict(tile)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 128, 1024, 8192])
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--best", type=int, default=2)
    args = parser.parse_args()
    arch = current_platform.arch
    print(f"# {describe_device()}")
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for rows in args.rows:
            found = candidates(rows)
            errors = pool.map(_compile, [(arch, rows, tile) for tile in found], chunksize=1)
            tune(rows, [tile for tile, error in zip(found, errors, strict=True) if error is None], args.best, arch)


if __name__ == "__main__":
    main()

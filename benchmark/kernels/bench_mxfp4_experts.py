"""Time of the routed experts in MXFP4 against the same experts in fp8, each in a replayed graph; bytes are counted.

    python benchmark/kernels/bench_mxfp4_experts.py [--shape v3] [--tokens 1 8 32 128 1024] [--tune]

Rows: fp8 is ``moe.fused_experts_fp8`` by Triton; mxfp4 with codes converted in registers (registers), with placed
codes if the architecture supports them (placed), and by ``tl.dot_scaled`` (scaled), or a note that its values are wrong
here. Each call of a graph has its own routing. TB/s counts each touched expert's codes and scales once and the rows in
and out. The last column is the time over fp8's, and the bytes over its bytes.
--tune looks for tiles of ``kernels/ops/moe/tiles.json`` instead, each product alone; nothing is written.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from moe_cases import SHAPES, MoeInputs, make_inputs, make_weights
from timing import bench_parser, describe_device, graph_time

from sglang.kernels.ops.moe.fused_experts import order_pairs
from sglang.kernels.ops.moe.fused_experts_fp8 import fused_experts_fp8_triton
from sglang.kernels.ops.moe.fused_experts_mxfp4 import (
    PLACED_ARCHS,
    fused_experts_mxfp4_scaled,
    fused_experts_mxfp4_triton,
    is_placed,
    mxfp4_product,
    mxfp4_tiles,
    place_experts,
)
from sglang.srt.platforms import current_platform
from sglang.test.amd_gate.serving_cases.moe import SERVING_LIMITS, empty_experts

# Bytes of a weight, its scale included: one byte and a float32 for each 128x128, half a byte and one for each 32.
FP8_BYTES, MXFP4_BYTES = 1 + 4 / 128**2, 0.5 + 1 / 32


def random_codes(experts: int, hidden: int, width: int) -> tuple[torch.Tensor, ...]:
    """Codes drawn evenly, and scales that keep the rows of results near those of their inputs."""
    w13, w13_scale, w2, w2_scale = empty_experts(experts, hidden, width, "cuda")
    for codes in (w13, w2):
        for expert in codes:
            expert.random_(0, 256)
    # The even codes have a deviation of 2.6.
    for scale, columns in ((w13_scale, hidden), (w2_scale, width)):
        scale.fill_(round(127 - torch.tensor(2.6 * columns**0.5).log2().item()))
    return w13, w13_scale, w2, w2_scale


def tiles_to_try(path: str, block_m: int) -> Iterator[dict[str, int]]:
    """Tiles whose weights in flight are 8 to 160 KiB; of 8 pairs those of the kernel for sm_90."""
    if block_m == 8:
        for warps, stages in itertools.product((1, 2, 4), (2, 3, 4, 5, 6, 8)):
            yield {"STAGES": stages, "num_warps": warps}
        return
    for n, k, warps, stages in itertools.product((16, 32, 64, 128), (64, 128, 256, 512), (4, 8), (2, 3, 4, 5)):
        flight, held = stages * k * (n + 4 * block_m) // 2, block_m * n
        if 8 << 10 <= flight <= 160 << 10 and held // (32 * warps) <= 128 and (warps == 4 or held >= 4096):
            tile = {"BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}
            yield tile | ({"GROUP_M": 1 if block_m < 64 else 16} if path == "many" else {})


def tune(inputs: MoeInputs, stacked: tuple[torch.Tensor, ...], tokens: int) -> None:
    """Print the best tiles of both products at ``tokens``, as the product takes codes and as they are placed."""
    w13, w13_scale, w2, w2_scale = stacked
    top_k, experts, placed = inputs.ids[0].shape[1], w13.shape[0], is_placed(w13)
    tiles = mxfp4_tiles(w13, torch.bfloat16, tokens, top_k)
    orders = [order_pairs(ids, experts, tiles.block_m) if tiles.path == "many" else None for ids in inputs.ids]
    activated = torch.randn(tokens * top_k, 2 * w2.shape[2], device="cuda").bfloat16()
    for scaled, is_gate_up in itertools.product((False,) if placed else (False, True), (True, False)):
        operands = (inputs.x, w13, w13_scale) if is_gate_up else (activated, w2, w2_scale)
        timed: list[tuple[float, dict[str, Any]]] = []
        for tile in tiles_to_try(tiles.path, tiles.block_m):
            calls = [
                partial(mxfp4_product, *operands, ids, order, tile, tiles.block_m, is_gate_up, scaled, placed)
                for ids, order in zip(inputs.ids, orders, strict=True)
            ]
            with contextlib.suppress(Exception):  # what does not compile or fit is left out
                timed.append((statistics.median(graph_time(calls, runs=3, min_seconds=0.004)), tile))
        way, product = "scaled" if scaled else "placed" if placed else "registers", "gate_up" if is_gate_up else "down"
        for seconds, tile in sorted(timed, key=lambda pair: pair[0])[:4]:
            shown = f"{seconds * 1e6:9.1f} us  BLOCK_M={tiles.block_m} {tile}"
            print(f"t{tokens} {tiles.path} {way:<10}{product:<8}{shown}", flush=True)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--tune", action="store_true", help="look for tiles, a few minutes for each number of tokens")
    parser.add_argument("--shape", choices=SHAPES, default="v3")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 1024])
    parser.add_argument("--routings", type=int, default=8, help="calls a graph, each with its own routing")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape, limit = SHAPES[args.shape], SERVING_LIMITS.get(args.shape)
    (w13, w2) = make_weights(shape, True, current_platform.arch)
    eight = (w13.data, w13.scale, w2.data, w2.scale)
    four = random_codes(shape.experts, shape.hidden, shape.intermediate)
    placed = tuple(one.clone() for one in four) if current_platform.arch in PLACED_ARCHS else ()
    if placed:
        place_experts(*placed)
    runs: dict[str, tuple[Callable[..., torch.Tensor], tuple[torch.Tensor | None, ...], float]] = {
        "fp8": (partial(fused_experts_fp8_triton, limit=limit), eight, FP8_BYTES),
        "mxfp4 registers": (partial(fused_experts_mxfp4_triton, limit=limit), four, MXFP4_BYTES),
        "mxfp4 placed": (partial(fused_experts_mxfp4_triton, limit=limit), placed, MXFP4_BYTES),
        "mxfp4 scaled": (partial(fused_experts_mxfp4_scaled, limit=limit), four, MXFP4_BYTES),
    }
    print(f"# {describe_device()}; {args.shape}; median, min and max of {args.runs} runs")
    print(f"{'case':<26}{'us':>10}{'min':>10}{'max':>10}{'TB/s':>7}{'MB':>9}   time and bytes over fp8's")
    for tokens in args.tokens:
        inputs = make_inputs(shape, tokens, w13, w2, args.routings if tokens <= 128 else 1)
        if args.tune:
            tune(inputs, placed or four, tokens)
            continue
        first = (0.0, 0.0)
        for name, (run, stacked, itemsize) in runs.items():
            if not stacked:
                continue
            calls = [
                lambda w=weights, i=ids, run=run, stacked=stacked, x=inputs.x: run(x, *stacked, w, i)
                for weights, ids in zip(inputs.weights, inputs.ids, strict=True)
            ]
            try:
                seconds = graph_time(calls, runs=args.runs)
            except Exception as error:  # a variant that does not run must not hide the others
                print(f"{name} t{tokens}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
                continue
            us, low, high = (1e6 * pick(seconds) for pick in (statistics.median, min, max))
            moved = 3 * inputs.touched * shape.hidden * shape.intermediate * itemsize + 4 * tokens * shape.hidden
            first = first if first[0] else (us, moved)
            figures = f"{us:10.1f}{low:10.1f}{high:10.1f}{moved / us / 1e6:7.2f}{moved / 1e6:9.1f}"
            beside = f"{us / first[0]:.2f} {moved / first[1]:.2f}, {inputs.touched:.1f} experts read"
            print(f"{name + f' t{tokens}':<26}{figures}   {beside}", flush=True)


if __name__ == "__main__":
    main()

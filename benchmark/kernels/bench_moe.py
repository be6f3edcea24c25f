"""Time of the routed experts against the bytes and operations they cannot do without, in a replayed graph.

    python benchmark/kernels/bench_moe.py [--shapes v2lite qwen35 v3] [--tokens 1 8 32] [--fp8] [--impl triton]

TB/s counts each touched expert's matrices once and the rows in and out; TFLOP/s counts the products. Each call of a
graph has its own routing. The anchor is the time of sglang 0.5.12.post1's Triton experts (no tuned table for these
shapes) on one H100 80GB, 2026-11-22, in bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from moe_cases import SHAPES, TOKENS, make_inputs, make_weights
from timing import Timed, bench, bench_parser

from sglang.kernels.ops.moe.fused_experts import fused_experts
from sglang.kernels.ops.moe.fused_experts_fp8 import fused_experts_fp8
from sglang.kernels.ops.moe.tiles import choose_tiles
from sglang.kernels.spec import Op
from sglang.srt.platforms import current_platform

# Microseconds by tokens.
ANCHORS = {
    "v2lite": {1: 53.5, 8: 223.3, 32: 371.8, 128: 485.0, 1024: 694.5, 8192: 3809.6},
    "qwen35": {1: 37.2, 8: 151.2, 32: 355.9, 128: 550.0, 1024: 812.7, 8192: 2179.6},
    "v3": {1: 265.9, 8: 1677.1, 32: 5063.7, 128: 7536.8, 1024: 11734.3, 8192: 30076.7},
}


def rows(op: Op, args: argparse.Namespace) -> Iterator[Timed]:
    run = next(impl.fn for impl in op.impls if impl.name == args.impl)
    for name in args.shapes:
        shape = SHAPES[name]
        w13, w2 = make_weights(shape, args.fp8, current_platform.arch)
        stacked = (w13.data, w13.scale, w2.data, w2.scale) if args.fp8 else (w13.data, w2.data)
        for tokens in args.tokens:
            inputs = make_inputs(shape, tokens, w13, w2, args.routings if tokens <= 128 else 1)
            calls = [
                lambda w=weights, i=ids, x=inputs.x, stacked=stacked: run(x, *stacked, w, i)
                for weights, ids in zip(inputs.weights, inputs.ids, strict=True)
            ]
            moved, bits = shape.bytes_of(inputs.touched, tokens, w13.data.itemsize), 8 * w13.data.itemsize
            path = choose_tiles(current_platform.arch, bits, tokens, shape.top_k, shape.experts).path
            note = f"{inputs.touched:.1f} experts read, path {path}"
            yield Timed(f"{name} t{tokens}", calls, moved, shape.flops(tokens), note)
        # The next shape's weights need the room.
        del w13, w2, stacked, inputs, calls


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--fp8", action="store_true", help="8-bit weights in blocks of 128x128, rows quantised")
    parser.add_argument("--impl", default="triton", help="name of the implementation of moe.fused_experts")
    parser.add_argument("--routings", type=int, default=8, help="calls a graph, each with its own routing")
    args = parser.parse_args()
    op = fused_experts_fp8 if args.fp8 else fused_experts
    torch.manual_seed(0)
    anchors = {f"{name} t{tokens}": (us,) for name, row in ANCHORS.items() for tokens, us in row.items()}
    bench(f"{op.name}={args.impl}", rows(op, args), {} if args.fp8 else anchors, args)


if __name__ == "__main__":
    main()

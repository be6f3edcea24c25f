"""Time of the routed experts against the bytes and operations they cannot do without, in a replayed graph.

    python benchmark/kernels/bench_moe.py [--shapes v2lite qwen35 v3] [--tokens 1 8 32] [--fp8] [--impl triton]

TB/s counts each touched expert's matrices once and the rows in and out; TFLOP/s counts the products. Each call of a
graph has its own routing. ``anchor`` is the time of sglang 0.5.12.post1's Triton experts (no tuned table for these
shapes) on one H100 80GB, 2026-11-22, in bf16; ``ratio`` is ours over it.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch
from moe_cases import SHAPES, TOKENS, describe_device, graph_time, make_inputs, make_weights

from sglang.kernels.ops.moe.fused_experts import fused_experts
from sglang.kernels.ops.moe.fused_experts_fp8 import fused_experts_fp8
from sglang.kernels.ops.moe.tiles import choose_tiles
from sglang.srt.platforms import current_platform

# Microseconds by tokens.
ANCHORS = {
    "v2lite": {1: 53.5, 8: 223.3, 32: 371.8, 128: 485.0, 1024: 694.5, 8192: 3809.6},
    "qwen35": {1: 37.2, 8: 151.2, 32: 355.9, 128: 550.0, 1024: 812.7, 8192: 2179.6},
    "v3": {1: 265.9, 8: 1677.1, 32: 5063.7, 128: 7536.8, 1024: 11734.3, 8192: 30076.7},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--fp8", action="store_true", help="8-bit weights in blocks of 128x128, rows quantised")
    parser.add_argument("--impl", default="triton", help="name of the implementation of moe.fused_experts")
    parser.add_argument("--routings", type=int, default=8, help="calls a graph, each with its own routing")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row as well")
    args = parser.parse_args()
    op = fused_experts_fp8 if args.fp8 else fused_experts
    run = next(impl.fn for impl in op.impls if impl.name == args.impl)
    torch.manual_seed(0)
    print(f"# {describe_device()}; {op.name}={args.impl}, median, min and max of 5 runs")
    print("case           experts        us       min       max   TB/s  TFLOP/s   anchor  ratio")
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
            seconds = graph_time(calls)
            median = statistics.median(seconds)
            moved = shape.bytes_of(inputs.touched, tokens, w13.data.itemsize)
            anchor = None if args.fp8 else ANCHORS[name].get(tokens)
            bits = 8 * w13.data.itemsize
            row = {
                "case": f"{name} t{tokens}",
                "path": choose_tiles(current_platform.arch, bits, tokens, shape.top_k, shape.experts).path,
                "experts": inputs.touched,
                "us": median * 1e6,
                "us_min": min(seconds) * 1e6,
                "us_max": max(seconds) * 1e6,
                "tb_per_s": moved / median / 1e12,
                "tflop_per_s": shape.flops(tokens) / median / 1e12,
                "anchor_us": anchor,
            }
            ratio = f"{median * 1e6 / anchor:6.2f}" if anchor else f"{'-':>6}"
            print(
                f"{row['case']:<14} {row['experts']:7.1f} {row['us']:9.1f} {row['us_min']:9.1f} {row['us_max']:9.1f} "
                f"{row['tb_per_s']:6.2f} {row['tflop_per_s']:8.1f} {anchor or 0:8.1f} {ratio}",
                flush=True,
            )
            if args.json:
                print(json.dumps(row), flush=True)
        del w13, w2, stacked, inputs, calls
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

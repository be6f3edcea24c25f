"""Time of the attention kernels against the bytes and products they cannot do without, in a replayed graph.

    python benchmark/kernels/bench_attention.py [--only mla_h16 gqa_16x2_d256] [--run 64] [--runs 5] [--json]

TB/s counts each key, value or latent row once, the queries and the result; TFLOP/s counts both products, half of them
where the mask hides half. Each call of a graph reads other cache rows, so small batches read memory and not the cache.
The anchors are sglang 0.5.12.post1 on one H100 80GB, 2026-11-22: its Triton kernels, and FlashAttention-3.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from attention_cases import (
    DECODE_LAYOUTS,
    DECODE_SHAPES,
    EXTEND_LAYOUTS,
    EXTEND_SHAPES,
    AttentionCase,
    decode_case,
    extend_case,
)
from moe_cases import describe_device, graph_time

ANCHORS = json.loads(Path(__file__).with_name("attention_anchors.json").read_text(encoding="utf-8"))


def cases(only: list[str], run: int) -> Iterator[partial[AttentionCase]]:
    """The rows of the anchor table, each made when it is called."""
    for layout in DECODE_LAYOUTS:
        for batch, tokens in DECODE_SHAPES if layout in only else ():
            yield partial(decode_case, layout, batch, tokens, run)
    for layout in EXTEND_LAYOUTS:
        for batch, tokens in EXTEND_SHAPES if layout in only else ():
            yield partial(extend_case, layout, batch, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    layouts = list(dict.fromkeys([*DECODE_LAYOUTS, *EXTEND_LAYOUTS]))
    parser.add_argument("--only", nargs="+", choices=layouts, default=layouts)
    parser.add_argument("--run", type=int, default=1, help="slots that lie side by side (1: every row alone)")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object a row as well")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"# {describe_device()}; bf16, slots in runs of {args.run}, median (min .. max) of {args.runs} runs")
    columns = "us", "min", "max", "TB/s", "TFLOP/s", "triton", "fa3", "ratio"
    widths = 8, 8, 8, 6, 8, 8, 8, 6
    print(f"{'case':<28} " + " ".join(f"{name:>{width}}" for name, width in zip(columns, widths, strict=True)))
    for make in cases(args.only, args.run):
        case = make()
        seconds = graph_time(case.calls, runs=args.runs)
        median = statistics.median(seconds)
        anchor = ANCHORS.get(case.name, {})
        row = {
            "case": case.name,
            "us": median * 1e6,
            "us_min": min(seconds) * 1e6,
            "us_max": max(seconds) * 1e6,
            "tb_per_s": case.num_bytes / median / 1e12,
            "tflop_per_s": case.flops / median / 1e12,
            "anchor_triton_us": anchor.get("triton"),
            "anchor_fa3_us": anchor.get("fa3"),
        }
        best = min(anchor.values(), default=0.0)
        print(
            f"{case.name:<28} {row['us']:8.1f} {row['us_min']:8.1f} {row['us_max']:8.1f} {row['tb_per_s']:6.2f} "
            f"{row['tflop_per_s']:8.1f} {anchor.get('triton', 0):8.1f} {anchor.get('fa3', 0):8.1f} "
            + (f"{row['us'] / best:6.2f}" if best else f"{'-':>6}"),
            flush=True,
        )
        if args.json:
            print(json.dumps(row), flush=True)
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

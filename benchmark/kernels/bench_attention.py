"""Time of the attention kernels against the bytes and products they cannot do without, in a replayed graph.

    python benchmark/kernels/bench_attention.py [--only mla_h16 gqa_16x2_d256] [--run 64] [--runs 5] [--json]

TB/s counts each key, value or latent row once, the queries and the result; TFLOP/s counts both products, half of them
where the mask hides half. Each call of a graph reads other cache rows, so small batches read memory and not the cache.
The anchors are sglang 0.5.12.post1 on one H100 80GB, 2026-11-22: its Triton kernels, and FlashAttention-3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from attention_cases import DECODE_LAYOUTS, DECODE_SHAPES, EXTEND_LAYOUTS, EXTEND_SHAPES, decode_case, extend_case
from timing import Timed, bench, bench_parser

ANCHORS = json.loads(Path(__file__).with_name("attention_anchors.json").read_text(encoding="utf-8"))


def cases(only: list[str], run: int) -> Iterator[Timed]:
    """The rows of the anchor table."""
    for layout in DECODE_LAYOUTS:
        for batch, tokens in DECODE_SHAPES if layout in only else ():
            yield decode_case(layout, batch, tokens, run)
    for layout in EXTEND_LAYOUTS:
        for batch, tokens in EXTEND_SHAPES if layout in only else ():
            yield extend_case(layout, batch, tokens)


def main() -> None:
    parser = bench_parser(__doc__)
    layouts = list(dict.fromkeys([*DECODE_LAYOUTS, *EXTEND_LAYOUTS]))
    parser.add_argument("--only", nargs="+", choices=layouts, default=layouts)
    parser.add_argument("--run", type=int, default=1, help="slots that lie side by side (1: every row alone)")
    args = parser.parse_args()
    torch.manual_seed(0)
    anchors = {name: list(times.values()) for name, times in ANCHORS.items()}
    bench(f"bf16, slots in runs of {args.run}, anchors triton / fa3", cases(args.only, args.run), anchors, args)


if __name__ == "__main__":
    main()

"""Time of DeepSeek V4's first projections of attention: one product for ``wq_a`` and ``wkv`` against two.

    python benchmark/kernels/bench_fused_wqa_wkv.py [--hidden 4096 7168] [--rows 1 8 32 64] [--runs 5] [--json]

Both forms get rows that are quantised already (8 bits) or plain (bf16), as the op table chooses the product. TB/s
counts the two matrices once. Each call of a graph has matrices of its own, more than the caches hold.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from timing import Timed, bench, bench_parser, graph_time

from sglang.kernels.ops.linear.dense import dense_linear
from sglang.kernels.ops.quant.group_fp8 import block_fp8_linear, quantize_groups
from sglang.kernels.registry import REGISTRY
from sglang.test.op_cases.quant import random_blocks

# Rows of wq_a by hidden size (Flash, Pro), and of wkv.
Q_LORA_RANK = {4096: 1024, 7168: 1536}
HEAD_DIM = 512
# More than the caches of the local GPUs.
ROTATED_BYTES = 160 << 20


def cases(hidden: list[int], tokens: list[int], runs: int) -> Iterator[Timed]:
    for width in hidden:
        parts = (Q_LORA_RANK[width], HEAD_DIM)
        for bits in (8, 16):
            moved = sum(parts) * width * bits // 8
            count = ROTATED_BYTES // moved
            one = [matrix(sum(parts), width, bits) for _ in range(count)]
            two = [[matrix(part, width, bits) for part in parts] for _ in range(count)]
            for rows in tokens:
                x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
                fused = [product(x, w) for w in one]
                apart = [partial(both, *(product(x, w) for w in pair)) for pair in two]
                times = [statistics.median(graph_time(calls, runs)) for calls in (apart, fused)]
                name = f"D{width} {bits} bits M{rows}"
                yield Timed(f"two {name}", apart, moved)
                yield Timed(f"one {name}", fused, moved, note=f"two / one {times[0] / times[1]:.2f}")


def matrix(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, ...]:
    """A random matrix [rows, columns] on the GPU, with the scales of its blocks where it has 8 bits."""
    if bits == 16:
        return (torch.randn(rows, columns, dtype=torch.bfloat16, device="cuda"),)
    return tuple(part.cuda() for part in random_blocks(rows, columns, torch.Generator().manual_seed(rows)))


def product(x: torch.Tensor, w: tuple[torch.Tensor, ...]) -> Callable[[], torch.Tensor]:
    """The product of the rows ``x`` with a matrix; for 8 bits they are quantised beforehand."""
    if len(w) == 1:
        return partial(dense_linear, x, *w)
    q, scale = quantize_groups(x, w[0].dtype)
    return partial(block_fp8_linear, q, *w, scale, x.dtype)


def both(first: Callable[[], torch.Tensor], second: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return first(), second()


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", choices=sorted(Q_LORA_RANK), default=sorted(Q_LORA_RANK))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    args = parser.parse_args()
    chosen = ", ".join(f"{op.name} {REGISTRY.chosen(op)}" for op in (block_fp8_linear, dense_linear))
    bench(chosen, cases(args.hidden, args.rows, args.runs), {}, args)


if __name__ == "__main__":
    main()

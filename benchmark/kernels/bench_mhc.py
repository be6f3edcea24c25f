"""Time of DeepSeek V4's way from sub-block to sub-block: one fused op against leaving, entering and norm apart.

    python benchmark/kernels/bench_mhc.py [--hidden 4096 7168] [--rows 1 8 32 64] [--runs 5] [--json]

``fused`` is ``mhc.hc_post_pre`` (two launches), ``apart`` is ``mhc.hc_post``, ``mhc.hc_pre`` and the norm (four), as
the op table chooses; the last column is the time of apart over that of fused. TB/s counts rows, streams and the
matrix once in and once out, which the fused op cannot do without. Each call of a graph has inputs of its own, more
than the caches hold where 64 calls reach that: a layer's matrix is read from memory, as in a model.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial

from timing import Timed, bench, bench_parser, graph_time

from sglang.kernels.ops.mhc.hc_post import hc_post
from sglang.kernels.ops.mhc.hc_post_pre import hc_post_pre
from sglang.kernels.ops.mhc.hc_pre import hc_pre
from sglang.kernels.ops.norm.rmsnorm import rms_norm
from sglang.kernels.registry import REGISTRY
from sglang.test.aiter_mhc_cases import crossing

# More than the caches of the local GPUs.
ROTATED_BYTES = 160 << 20


def apart(row, x, post, comb, fn, base, scale, rms_eps, hc_eps, iterations, gain, norm_eps):
    streams = hc_post(row, x, post, comb)
    row, post, comb = hc_pre(streams, fn, base, scale, rms_eps, hc_eps, iterations)
    return streams, rms_norm(row, gain, norm_eps), post, comb


def rows(hidden: list[int], tokens: list[int], runs: int) -> Iterator[Timed]:
    for width in hidden:
        for num_rows in tokens:
            moved = num_rows * width * 2 * (1 + 4 + 4 + 1) + 24 * 4 * width * 4
            layers = max(2, min(64, ROTATED_BYTES // moved))
            inputs = [crossing(num_rows, width, "cuda", seed=layer) for layer in range(layers)]
            calls = [partial(apart, *args) for args in inputs]
            yield Timed(f"apart D{width} M{num_rows}", calls, moved)
            fused = [partial(hc_post_pre, *args) for args in inputs]
            times = [statistics.median(graph_time(each, runs)) for each in (calls, fused)]
            yield Timed(f"fused D{width} M{num_rows}", fused, moved, note=f"apart / fused {times[0] / times[1]:.2f}")


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[4096, 7168])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    args = parser.parse_args()
    ops = (hc_post_pre, hc_post, hc_pre, rms_norm)
    chosen = ", ".join(f"{op.name} {REGISTRY.chosen(op)}" for op in ops)
    bench(f"bf16, four streams; {chosen}", rows(args.hidden, args.rows, args.runs), {}, args)


if __name__ == "__main__":
    main()

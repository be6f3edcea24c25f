"""Time of the gated-delta-net kernels against the bytes they cannot do without, in a replayed graph.

    python benchmark/kernels/bench_gdn.py [--heads 16 32] [--runs 5] [--json]

TB/s counts each state once read and once written in decode, and q, k, v and the result once in extend. ``decode`` is
the whole step (convolution, gates, recurrence, gated norm); ``chunks`` is the chunked rule with its gates, ``extend``
the whole step around it. The anchors are sglang 0.5.12.post1 on one H100 80GB, 2026-11-22, 16 key and 32 value heads of
128: decode is its recurrence with gates, from packed projections and from split ones, without convolution and norm.
Each call of a graph works on other states, so small batches read memory and not the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from timing import Timed, bench, bench_parser

from sglang.kernels.ops.gdn.chunk import chunk_table
from sglang.kernels.ops.gdn.decode_step import gdn_decode_step
from sglang.kernels.ops.gdn.extend_step import gdn_extend_step, run_chunks, run_conv
from sglang.kernels.ops.gdn.shapes import GDNShape
from sglang.test.op_cases.gdn import step_inputs

# us by name of row: decode from packed and from split projections; the chunked rule.
ANCHORS = {
    "decode bs1": (10.5, 11.0),
    "decode bs8": (18.7, 21.1),
    "decode bs32": (52.6, 55.3),
    "decode bs128": (187.0, 189.2),
    "chunks 1x1024": (107.4,),
    "chunks 8x1024": (655.0,),
    "chunks 1x8192": (778.6,),
    "chunks 32x1024": (2664.0,),
}
DECODE_BATCHES = (1, 8, 32, 128)
EXTEND_SHAPES = ((1, 1024), (8, 1024), (1, 8192), (32, 1024))
DIM, WIDTH = 128, 4
# More than the caches of the local GPUs.
ROTATED_BYTES = 160 << 20


def inputs(rows: int, slots: int, heads: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Random arguments up to ``ssm_state`` on the GPU, bfloat16 with float32 decay rates and states."""
    shape = (heads[0], heads[1] // heads[0], DIM, DIM, WIDTH)
    return step_inputs(rows, slots, shape, dtype=torch.bfloat16, device="cuda")


def decode_row(batch: int, heads: tuple[int, int]) -> Timed:
    state_bytes = batch * heads[1] * DIM * DIM * 4
    layers = max(2, min(64, ROTATED_BYTES // state_bytes))
    args = inputs(batch, batch + 1, heads)
    pools = [(args[8].clone(), args[9].clone()) for _ in range(layers)]
    slots = torch.randperm(batch).cuda() + 1
    calls = [partial(gdn_decode_step, *args[:8], *pool, slots, 1e-6) for pool in pools]
    return Timed(f"decode bs{batch}", calls, 2 * state_bytes)


def extend_rows(batch: int, length: int, heads: tuple[int, int]) -> Iterator[Timed]:
    args = inputs(batch * length, batch + 1, heads)
    slots = torch.arange(batch).cuda() + 1
    bounds, chunks_of = (part.cuda() for part in chunk_table([length] * batch))
    shape = GDNShape(heads[0], heads[1], DIM, DIM, WIDTH)
    mixed_qkv, _, b, a, weight, A_log, dt_bias, _, columns, states = args
    qkv = run_conv(mixed_qkv, weight, columns, slots, bounds, chunks_of, shape)
    num_bytes = batch * length * 2 * (mixed_qkv.shape[1] + heads[1] * DIM)
    name = f"{batch}x{length}"
    chunks = partial(run_chunks, qkv, b, a, A_log, dt_bias, states, slots, bounds, chunks_of, shape)
    yield Timed(f"chunks {name}", [chunks], num_bytes)
    yield Timed(f"extend {name}", [partial(gdn_extend_step, *args, slots, bounds, chunks_of, 1e-6)], num_bytes)


def rows(heads: tuple[int, int]) -> Iterator[Timed]:
    for batch in DECODE_BATCHES:
        yield decode_row(batch, heads)
    for batch, length in EXTEND_SHAPES:
        yield from extend_rows(batch, length, heads)


def main() -> None:
    parser = bench_parser(__doc__)
    parser.add_argument("--heads", type=int, nargs=2, default=(16, 32), help="key and value heads")
    args = parser.parse_args()
    torch.manual_seed(0)
    heads = tuple(args.heads)
    bench(f"bf16, heads {heads[0]}/{heads[1]} of {DIM}", rows(heads), ANCHORS if heads == (16, 32) else {}, args)


if __name__ == "__main__":
    main()

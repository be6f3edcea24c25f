"""Find tile sizes of the routed experts' kernels on the local GPU, for ``kernels/ops/moe/tiles.json``.

    python benchmark/kernels/tune_moe.py --shape v2lite --tokens 1 8 128 [--block-m 16 32] [--fp8] [--path one]

The two products are timed apart, in replayed graphs. Candidates are compiled beforehand in ``--jobs`` processes that
use no GPU, and run only when they compile. Prints the best few of each product; nothing is written.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.pool import Pool
from typing import Any

import torch
from moe_cases import SHAPES, TOKENS, MoeInputs, MoeShape, make_inputs, make_weights
from timing import describe_device, graph_time

from sglang.kernels.ops.moe.fused_experts import Scaled, expert_product, one_token_down, one_token_product, order_pairs
from sglang.kernels.ops.moe.tiles import choose_tiles
from sglang.srt.platforms import current_platform
from sglang.test.amd_gate.driver import compile_only

# Bytes of weight tiles in flight per program; more does not fit next to a second program.
MAX_STAGE_BYTES = 200 << 10


@dataclass(frozen=True)
class Candidate:
    """One setting of one product. ``path`` as in MoeTiles; ``block_m`` 0 where the path has none."""

    path: str
    product: str
    block_m: int
    tile: tuple[tuple[str, int], ...]


def candidates(path: str, block_m: int, per_expert: float, fp8: bool) -> Iterator[Candidate]:
    """The grid that is searched; a step of an 8-bit product is one group of 128."""
    if path == "one":
        for product, widths in (("gate_up", (1, 2, 4, 8, 16)), ("down", (1, 2, 4, 8, 16))):
            for n, k, warps in itertools.product(widths, (256, 512, 1024), (1, 2, 4, 8)):
                parts = 2 if product == "gate_up" else 1 if fp8 else 8
                if 8 <= n * k * parts // (32 * warps) <= 256:
                    yield Candidate(path, product, 0, (("BLOCK_N", n), ("BLOCK_K", k), ("num_warps", warps)))
        return
    # A tile of the 8-bit down product may be two runs of columns, as one of gate and up always is.
    for product, parts in (("gate_up", 2), ("down", 1), *([("down", 2)] if path == "many" and fp8 else [])):
        wide = block_m >= 64 and not fp8
        for n, k, warps, stages in itertools.product(
            (64, 128, 256) if wide else (16, 32, 64, 128),
            (64, 128) if wide else (64, 128, 256),
            (4, 8),
            (2, 3, 4, 5, 6),
        ):
            held = block_m * n * parts // (32 * warps)
            flight = stages * k * 2 * (n * parts + block_m)
            if fp8 and (k != 128 or n > 128):
                continue
            flight //= 1 + fp8
            if flight > MAX_STAGE_BYTES or held > 128 or (not wide and flight < 16 << 10):
                continue
            # Few rows have no work for eight warps, unless it is to ask for bytes.
            if warps == 8 and block_m < 64 and not (fp8 and n == 128):
                continue
            if wide and (held < 32 or stages == 2):
                continue
            tile: list[tuple[str, int]] = [("BLOCK_N", n), ("BLOCK_K", k), ("num_warps", warps), ("num_stages", stages)]
            if path == "many":
                tile.append(("GROUP_M", 1 if per_expert <= block_m else 16))
            if product == "down" and parts == 2:
                tile.append(("TWO", True))
            yield Candidate(path, product, block_m, tuple(tile))
    # The kernel whose warps load or multiply has tiles of one size; sizes that it does not take do not compile.
    if path == "many" and block_m == 128 and current_platform.arch == "sm_90":
        for product, slots, group in itertools.product(("gate_up", "down"), (3, 4), (1, 4, 16)):
            yield Candidate(path, product, block_m, (("SLOTS", slots), ("GROUP_M", group)))


def product_of(candidate: Candidate, inputs: MoeInputs, activated: torch.Tensor, routing: int) -> Callable[[], Any]:
    """The candidate's product as a call; the ordering of pairs is done here, outside it."""
    is_gate_up = candidate.product == "gate_up"
    tile, ids, dtype = dict(candidate.tile), inputs.ids[routing], inputs.x.dtype
    w13, w2 = inputs.w13, inputs.w2
    operand = inputs.prepare(inputs.x if is_gate_up else activated)
    if candidate.path == "one":
        if is_gate_up or w2.is_fp8:
            return lambda: one_token_product(operand, w13 if is_gate_up else w2, ids, tile, dtype, is_gate_up)
        return lambda: one_token_down(operand.data, w2.data, inputs.weights[routing], ids, tile, dtype)
    order = order_pairs(ids, w13.data.shape[0], candidate.block_m) if candidate.path == "many" else None
    weight = w13 if is_gate_up else w2
    return lambda: expert_product(operand, weight, ids, order, tile, candidate.block_m, is_gate_up, dtype)


def _compile(job: tuple[str, MoeShape, int, bool, Candidate]) -> str | None:
    """Compile one candidate on shape-only tensors; the error's text when it does not compile."""
    arch, shape, tokens, fp8, candidate = job
    w13, w2 = make_weights(shape, fp8, arch, "meta")
    x = torch.empty(tokens, shape.hidden, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(tokens, shape.top_k, dtype=torch.int32, device="meta")
    inputs = MoeInputs(x, w13, w2, [torch.empty(tokens, shape.top_k, device="meta")], [ids])
    activated = torch.empty(tokens * shape.top_k, shape.intermediate, dtype=torch.bfloat16, device="meta")
    try:
        with compile_only(arch):
            product_of(candidate, inputs, activated, 0)()
    except Exception as error:  # a candidate that does not compile is left out and named
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


def tune(
    shape: MoeShape, tokens: int, block_ms: list[int], pool: Pool, weights: tuple[Scaled, Scaled], path: str | None
) -> None:
    arch, fp8 = current_platform.arch, weights[0].is_fp8
    path = path or choose_tiles(arch, 8 * weights[0].data.itemsize, tokens, shape.top_k, shape.experts).path
    per_expert = tokens * shape.top_k / shape.experts
    sizes = [0] if path == "one" else [16] if path == "few" else block_ms
    found = [candidate for size in sizes for candidate in candidates(path, size, per_expert, fp8)]
    errors = pool.map(_compile, [(arch, shape, tokens, fp8, candidate) for candidate in found], chunksize=1)
    usable = [candidate for candidate, error in zip(found, errors, strict=True) if error is None]
    print(f"## t{tokens} ({path}): {len(usable)} of {len(found)} candidates compile", flush=True)
    routings = 4 if tokens <= 128 else 1
    inputs = make_inputs(shape, tokens, *weights, routings)
    activated = torch.randn(tokens * shape.top_k, shape.intermediate, device="cuda").bfloat16()
    timed = []
    for candidate in usable:
        try:
            calls = [product_of(candidate, inputs, activated, routing) for routing in range(routings)]
            timed.append((statistics.median(graph_time(calls, runs=3, min_seconds=0.004)), candidate))
        except Exception as error:  # out of shared memory shows only at launch
            print(f"   {candidate}: {type(error).__name__}")
    for product in ("gate_up", "down"):
        best = sorted(((s, c) for s, c in timed if c.product == product), key=lambda pair: pair[0])[:5]
        for seconds, candidate in best:
            print(f"{product:<8} {seconds * 1e6:9.1f} us  BLOCK_M={candidate.block_m} {dict(candidate.tile)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="v2lite")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--block-m", nargs="+", type=int, default=[16, 64, 128])
    parser.add_argument("--fp8", action="store_true", help="8-bit weights in blocks of 128x128")
    parser.add_argument("--path", choices=("one", "few", "many"), help="Default: as the table chooses.")
    parser.add_argument("--jobs", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"# {describe_device()}, {args.shape}{' fp8' if args.fp8 else ''}")
    weights = make_weights(SHAPES[args.shape], args.fp8, current_platform.arch)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool:
        for tokens in args.tokens:
            tune(SHAPES[args.shape], tokens, args.block_m, pool, weights, args.path)


if __name__ == "__main__":
    main()

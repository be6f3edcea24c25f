"""The expert step of one of 8 expert ranks: cut to the proven bound, compared with the same code on the full buffer.

    python benchmark/moe/bench_ep_step.py [--shape v3] [--live 1 8 64 256] [--limit 512] [--json]

One GPU plays rank 0: its buffer holds ``live`` received rows, each with at least one expert of its own, and stale rows
after them. Replayed graphs; ``experts`` is ``run_experts`` alone, ``step`` all of ``run_moe_core``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))

from moe_cases import SHAPES, MoeShape  # noqa: E402
from timing import describe_device, graph_time  # noqa: E402

from sglang.srt.distributed.parallel_state import ParallelState, ProcessGroupHandle, override_parallel_state  # noqa: E402
from sglang.srt.layers.moe.ep_moe.layer import MoriEPMoE  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher.capacity import ROW_TIERS, input_rows  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher.config import MoriConfig  # noqa: E402
from sglang.srt.layers.moe.token_dispatcher.moriep import MoriEPNormalDispatchOutput  # noqa: E402
from sglang.srt.platforms import current_platform  # noqa: E402

WORLD = 8


def make_layer(shape: MoeShape, limit: int, device: str) -> MoriEPMoE:
    """Rank 0 of 8, which exchanges nothing here, with random weights in bf16."""
    state = ParallelState(ProcessGroupHandle(rank=0, size=WORLD), ep_size=WORLD)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with override_parallel_state(state), torch.device(device):
            config = MoriConfig(WORLD, limit)
            layer = MoriEPMoE(shape.experts, shape.hidden, shape.intermediate, shape.top_k, config)
    finally:
        torch.set_default_dtype(torch.float32)
    for param in (layer.w13_weight, layer.w2_weight):
        param.data.normal_(std=param.shape[-1] ** -0.5)
    return layer


def make_batch(layer: MoriEPMoE, shape: MoeShape, live: int, device: str) -> MoriEPNormalDispatchOutput:
    """A full buffer of which ``live`` rows arrived; the rest is stale, with valid routing."""
    rows, local = layer.dispatcher.config.max_recv, shape.experts // WORLD
    scores = torch.rand(rows, shape.experts, device=device)
    scores[torch.arange(rows), torch.randint(0, local, (rows,))] = 2.0
    weights, ids = scores.topk(shape.top_k)
    hidden = torch.randn(rows, shape.hidden, device=device).bfloat16()
    total = torch.tensor([live], dtype=torch.int32, device=device)
    weights, ids = weights.float().contiguous(), ids.int().contiguous()
    return MoriEPNormalDispatchOutput(hidden, None, ids, weights, total, ids, weights, hidden.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="v3")
    parser.add_argument("--live", nargs="+", type=int, default=[1, 8, 64, 256])
    parser.add_argument("--limit", type=int, default=512, help="SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row as well")
    args = parser.parse_args()
    torch.manual_seed(0)
    shape = SHAPES[args.shape]
    layer = make_layer(shape, args.limit, "cuda")
    full = layer.dispatcher.config.max_recv
    print(f"# {describe_device()}; {args.shape}, rank 0 of {WORLD}, buffer of {full} rows; 5 runs, us")
    print(f"live  rows  part     {'cut: median [min, max]':26s} {'full: median [min, max]':26s} full / cut")
    for live in args.live:
        batches = [make_batch(layer, shape, live, "cuda") for _ in range(4)]
        cut = input_rows(live, full, ROW_TIERS[current_platform.kind])
        for part in ("step", "experts"):
            times = [graph_time([call_of(layer, part, batch, rows) for batch in batches]) for rows in (cut, full)]
            medians = [statistics.median(seconds) * 1e6 for seconds in times]
            shown = [f"{m:8.1f} [{min(t) * 1e6:.1f}, {max(t) * 1e6:.1f}]" for m, t in zip(medians, times)]
            gain = medians[1] / medians[0]
            print(f"{live:4d} {cut:5d}  {part:8s} {shown[0]:26s} {shown[1]:26s} {gain:8.2f}", flush=True)
            if args.json:
                row = {"live": live, "rows": cut, "part": part, "cut_us": medians[0], "full_us": medians[1]}
                print(json.dumps(row), flush=True)


def call_of(layer: MoriEPMoE, part: str, batch: MoriEPNormalDispatchOutput, rows: int) -> Callable[[], torch.Tensor]:
    """A call of the whole step, or of the experts alone on ids that are masked beforehand."""
    if part == "step":
        arrived = batch._replace(recv_cap=rows)
        return lambda: layer.run_moe_core(arrived).hidden_states
    stale = torch.arange(rows, device=batch.topk_ids.device).unsqueeze(1) >= batch.num_recv_tokens_per_expert
    ids = layer.placement.local_ids(batch.topk_ids[:rows]).masked_fill(stale, -1)
    return lambda: layer.run_experts(batch.hidden_states[:rows], batch.topk_weights[:rows], ids)


if __name__ == "__main__":
    main()

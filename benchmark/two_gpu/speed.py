"""The MoE block of DeepSeek-V3 over one or two GPUs, as captured decode steps: cut, streams, phases, scaling.

    python benchmark/two_gpu/speed.py [--world 1] [--tokens 1 8 64 256] [--layers 1] [--limit 1024] [--runs 3]

Each rank brings the same number of tokens (attention data parallelism); experts are spread over the ranks. Variants,
timed in turn within each run:
    cut           experts on the rows that can arrive (what the server does)
    full buffer   experts on all rows of the receive buffer (--limit rows per rank)
    two streams   as cut, the shared expert next to the exchange and the routed experts
    two-phase     as cut, dispatch and combine split in send and receive
    both          two streams and two-phase
Weights are random (norm-preserving). The share of the shared expert that overlapped the rest is that of the tracer.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.multiprocessing as mp

from sglang.kernels.registry import REGISTRY
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.distributed.parallel_state import get_parallel_state, init_parallel_state
from sglang.srt.layers.moe.ep_moe.layer import MoriEPMoE
from sglang.srt.layers.moe.token_dispatcher.capacity import ROW_TIERS
from sglang.srt.layers.moe.token_dispatcher.config import MoriConfig
from sglang.srt.layers.moe.token_dispatcher.moriep import make_dispatcher
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.models.deepseek_common.moe import DeepseekV2MoE
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler
from sglang.srt.utils.common import get_free_port
from sglang.srt.utils.multi_stream_utils import OverlapSite, StreamOverlap
from sglang.srt.utils.overlap_trace import merge_rows
from sglang.test.device_time import device_seconds
from sglang.test.published_sizes import DEEPSEEK_V3

REPLAYS = 30


@dataclass(frozen=True)
class Variant:
    name: str
    full_buffer: bool = False
    two_streams: bool = False
    two_phase: bool = False


VARIANTS = (
    Variant("cut"),
    Variant("full buffer", full_buffer=True),
    Variant("two streams", two_streams=True),
    Variant("two-phase", two_phase=True),
    Variant("both", two_streams=True, two_phase=True),
)


class Layers:
    """Some MoE blocks, switched between variants without another copy of the weights."""

    def __init__(self, count: int, limit: int, device: torch.device) -> None:
        config, world = DeepseekConfig.from_hf(DEEPSEEK_V3), get_parallel_state().world
        self._sizes = (world, config.n_routed_experts, config.hidden_size, config.num_experts_per_tok)
        self._mori = MoriConfig(world.size, limit)
        self._device = device
        self._stream = torch.cuda.Stream()
        with torch.device(device):
            self.blocks = [DeepseekV2MoE(config, StreamOverlap()) for _ in range(count)]
        for block in self.blocks:
            for param in block.parameters():
                param.data.normal_(0.0, param.shape[-1] ** -0.5 if param.ndim > 1 else 0.05)

    def use(self, variant: Variant) -> None:
        site = OverlapSite("shared", enabled=variant.two_streams, capture_only=True)
        world, *sizes = self._sizes
        dispatcher = make_dispatcher(
            replace(self._mori, low_latency=variant.two_phase), world, *sizes, torch.bfloat16, self._device
        )
        for block in self.blocks:
            assert isinstance(block.experts, MoriEPMoE)
            block.overlap = StreamOverlap(self._stream, site)
            block.experts.dispatcher, block.experts.recv_stats = dispatcher, dispatcher.recv_stats
            # The receive buffer as the one number of rows that kernels are tuned for.
            whole = (dispatcher.config.max_recv,)
            block.experts._tiers = whole if variant.full_buffer else ROW_TIERS[current_platform.kind]

    def run(self, x: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, forward_batch)
        return x


def step(tokens: int, device: torch.device) -> ForwardBatch:
    groups = get_parallel_state().attn_dp_size
    rows = torch.zeros(tokens, dtype=torch.int64, device=device)
    return ForwardBatch(
        forward_mode=ForwardMode.DECODE, batch_size=tokens, input_ids=rows, positions=rows, req_pool_indices=rows,
        seq_lens=rows, seq_lens_cpu=[1] * tokens, out_cache_loc=rows, attn_backend=None,
        num_token_non_padded=torch.tensor([tokens], dtype=torch.int32, device=device), num_token_non_padded_cpu=tokens,
        global_num_tokens_cpu=[tokens] * groups, global_num_rows_cpu=[tokens] * groups,
    )  # fmt: skip


def capture(layers: Layers, x: torch.Tensor, forward_batch: ForwardBatch) -> torch.cuda.CUDAGraph:
    layers.run(x, forward_batch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers.run(x, forward_batch)
    graph.replay()
    return graph


def time_us(graph: torch.cuda.CUDAGraph) -> float:
    """Mean of some replays in us."""
    get_parallel_state().world.smallest(0)  # a barrier
    return device_seconds(graph.replay, REPLAYS) * 1e6


def bench(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    world = args.world
    init_parallel_state(
        rank, world, f"tcp://127.0.0.1:{port}", "nccl", 120.0, attn_dp_size=world, ep_size=world, local_rank=rank
    )
    set_global_server_args_for_scheduler(
        ServerArgs(model_path="", tp_size=world, ep_size=world, dp_size=world, moe_a2a_backend="mori")
    )
    os.environ["SGLANG_TRACE_OVERLAP"] = "1"
    REGISTRY.freeze()
    torch.set_default_dtype(torch.bfloat16)
    say: Callable[[str], None] = print if rank == 0 else lambda _: None
    say(f"# {world} x {current_platform.describe()}; V3's sizes, {args.layers} layers, bf16, limit {args.limit}")
    with torch.inference_mode():
        layers = Layers(args.layers, args.limit, device)
        for tokens in args.tokens:
            for line in bench_size(layers, tokens, args, device):
                say(line)


def bench_size(layers: Layers, tokens: int, args: argparse.Namespace, device: torch.device) -> list[str]:
    x = torch.randn(tokens, 7168, device=device, generator=torch.Generator(device).manual_seed(tokens))
    forward_batch = step(tokens, device)
    graphs: dict[Variant, Any] = {}
    traces = {}
    for variant in VARIANTS:
        if not (variant.full_buffer and args.no_full_buffer):
            layers.use(variant)
            graphs[variant] = capture(layers, x, forward_batch)
            traces[variant] = [block.overlap.trace for block in layers.blocks]
    times: dict[Variant, list[float]] = {variant: [] for variant in graphs}
    for run in range(args.runs + 1):
        for variant, graph in graphs.items():
            took = time_us(graph) / args.layers
            if run:
                times[variant].append(took)
    base = statistics.median(times[VARIANTS[0]])
    lines = [f"{tokens} tokens per rank: us per layer, median (min .. max) of {args.runs}, and over cut"]
    for variant, took in times.items():
        middle = statistics.median(took)
        shares = [
            row["overlap_fraction"] for row in merge_rows(trace for trace in traces[variant] if trace is not None)
        ]
        beside = f", {statistics.fmean(shares):.0%} of the side overlapped" if shares else ""
        lines.append(
            f"  {variant.name:<12} {middle:8.1f} ({min(took):.1f} .. {max(took):.1f})  {middle / base:.3f}{beside}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=int, default=torch.cuda.device_count())
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--limit", type=int, default=1024)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--no-full-buffer", action="store_true")
    args = parser.parse_args()
    if args.world > torch.cuda.device_count() or args.world < 1:
        parser.error(f"--world {args.world}: there are {torch.cuda.device_count()} GPUs")
    if args.world == 1:
        bench(0, args, 0)
    else:
        mp.spawn(bench, (args, get_free_port()), nprocs=args.world)


if __name__ == "__main__":
    main()

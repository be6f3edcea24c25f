"""Decode steps of one static batch: time against the floor, and the launches that make it up.

    python benchmark/step/bench_step.py --model-path DIR/deepseek-v2-lite --load-format dummy --batch-size 1 8 32 128
        [--input-len 1024] [--steps 32] [--runs 3] [--copy-tbps 3.02] [--kernels 12] [--prefill-kernels 12]
        [flags of the server]

The floor reads every active weight once (of the experts, those that the step's routing touches, counted in an eager
step), every live KV row once, and each recurrent state in and out, at the copy bandwidth. The launch tables are
those of one replayed step, and of one prefill.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from sglang.bench_utils.one_batch import StaticBatch
from sglang.bench_utils.one_batch_cli import load
from sglang.bench_utils.timing import timed
from sglang.srt.configs.cache_layout import FULL, STATE
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.moe.topk import TopKOutput
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs, exit_with_errors
from sglang.srt.utils.logging_config import configure_logging
from sglang.test.device_time import launches


def expert_bytes(module: FusedMoE) -> int:
    """Bytes of one expert of a layer."""
    return sum(param.nbytes // param.shape[0] for param in module.parameters())


@dataclass
class Floor:
    """Bytes that one decode step cannot avoid."""

    dense: int
    experts: int
    touched: float  # experts per layer, mean
    kv: int
    state: int

    @property
    def total(self) -> int:
        return self.dense + self.experts + self.kv + self.state


def count_floor(runner: ModelRunner, batch: StaticBatch, ids: torch.Tensor) -> Floor:
    """Run one step without graphs, and count the experts that it touches."""
    touched: dict[FusedMoE, int] = {}

    def watch(module: torch.nn.Module, inputs: tuple[torch.Tensor, TopKOutput, object], _: torch.Tensor) -> None:
        assert isinstance(module, FusedMoE)
        # Every token goes to shared experts: their slots count as dense, where the views of them are parameters.
        ids = inputs[1].ids
        touched[module] = int(ids[ids < module.num_experts].unique().numel())

    layers = [module for module in runner.model.modules() if isinstance(module, FusedMoE)]
    hooks = [layer.register_forward_hook(watch) for layer in layers]
    graphs, runner.decode_graphs = runner.decode_graphs, None
    try:
        batch.decode(ids)
    finally:
        runner.decode_graphs = graphs
        for hook in hooks:
            hook.remove()
    params = {id(param): param.nbytes for param in runner.model.parameters()}
    skipped = {id(param) for layer in layers for param in layer.parameters()}
    heads = {id(m.weight) for m in runner.model.modules() if isinstance(m, ParallelLMHead)}
    for module in runner.model.modules():
        if isinstance(module, VocabParallelEmbedding) and id(module.weight) not in heads:
            skipped.add(id(module.weight))
    tokens = sum(batch.seq_lens)
    layout = runner.pools.layout
    return Floor(
        dense=sum(size for key, size in params.items() if key not in skipped),
        experts=sum(expert_bytes(layer) * count for layer, count in touched.items()),
        touched=statistics.fmean(touched.values()) if touched else 0.0,
        # If the page size matters, pools count whole pages.
        kv=layout.num_bytes(FULL, tokens + -tokens % runner.pools.page_size),
        state=2 * layout.num_bytes(STATE, len(batch.seq_lens)),
    )


def run_size(runner: ModelRunner, allocator: TokenToKVPoolAllocator, size: int, args: argparse.Namespace) -> None:
    vocab = runner.model_config.vocab_size
    prompts = np.random.default_rng(size).integers(0, vocab, size=(size, args.input_len))
    prefill, decode = [], []
    for run in range(args.runs + 1):
        batch = StaticBatch(runner, allocator, size)
        _, seconds = timed(partial(batch.extend, prompts.tolist()))
        steps = []
        for _ in range(args.steps if run else 2):
            # Random tokens: a model of random weights would repeat one token, and with it one choice of experts.
            fed = torch.randint(0, vocab, (size,), device=runner.device)
            _, step = timed(partial(batch.decode, fed))
            steps.append(step * 1e3)
        if run:  # the first warms up
            prefill.append(size * args.input_len / seconds)
            decode.append(statistics.median(steps))
        if run < args.runs:
            batch.release()
    fed = torch.randint(0, vocab, (size,), device=runner.device)
    floor = count_floor(runner, batch, fed)
    floor_ms = floor.total / (args.copy_tbps * 1e9)
    middle = statistics.median(decode)
    print(
        f"batch {size}: decode step {middle:.3f} ms ({min(decode):.3f} .. {max(decode):.3f} over {args.runs} runs), "
        f"floor {floor_ms:.3f} ms ({middle / floor_ms:.2f}x; GB: dense {floor.dense / 1e9:.2f}, experts "
        f"{floor.experts / 1e9:.2f} of {floor.touched:.1f} touched per layer, KV {floor.kv / 1e9:.2f}, states "
        f"{floor.state / 1e9:.2f}); prefill {statistics.median(prefill):,.0f} tok/s "
        f"({min(prefill):,.0f} .. {max(prefill):,.0f})"
    )
    layers = runner.model_config.num_hidden_layers
    print_launches("decode", launches(lambda: batch.decode(fed)), layers, args.kernels)
    batch.release()
    if args.prefill_kernels:
        batch = StaticBatch(runner, allocator, size)
        rows = launches(lambda: batch.extend(prompts.tolist()))
        print_launches("prefill", rows, layers, args.prefill_kernels)
        batch.release()


def print_launches(what: str, rows: list[tuple[str, int, float]], layers: int, shown: int) -> None:
    total, busy = sum(row[1] for row in rows), sum(row[2] for row in rows)
    print(f"  {what}: {total} launches, {total / layers:.1f} per layer; {busy / 1e3:.3f} ms busy")
    for name, count, us in rows[:shown]:
        print(f"  {us:9.1f} us {count:5d} x {us / count:8.2f}  {name[:100]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--copy-tbps", type=float, default=3.02)
    parser.add_argument("--kernels", type=int, default=12)
    parser.add_argument("--prefill-kernels", type=int, default=0)
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        exit_with_errors(["this benchmark counts the launches of a GPU, and there is none"])
    server_args = ServerArgs.from_cli_args(args)
    configure_logging(server_args.log_level, "main")
    runner, allocator, _ = load(server_args, args.batch_size)
    print(f"# {current_platform.describe()}; {args.input_len} tokens in")
    with torch.inference_mode():
        for size in args.batch_size:
            run_size(runner, allocator, size, args)


if __name__ == "__main__":
    main()

"""What speculation costs and gives: steps alone, whole cycles, and the time per token at chosen accept lengths.

    python benchmark/speculative/bench_speculative.py --model-path DIR/deepseek-v3-4l-fp8 --load-format dummy
        [--steps 3 1] [--batch-size 1 8 32] [--input-len 1024] [--accept-length 1 1.8 2.6] [--cycles 24] [--runs 3]
        [flags of the server]

In one process: the model without speculation, then with each number of ``--steps``. The model does not decide how many
drafts are accepted, as its weights are random: each step takes a random number around the accept length (the tokens
mean nothing, but the work is the same). Per batch size it prints

    decode B*D / verify B     the replayed steps alone; the target for their ratio is 1.05
    cycle over graphs         a whole cycle, host included, over its replayed steps one after the other
    ms per token              without speculation, and at each accept length; and the accept length that breaks even
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from dataclasses import asdict
from typing import Any
from unittest import mock

import numpy as np
import torch

from sglang.bench_utils.timing import timed
from sglang.srt.managers.io_struct import AbortReq, FlushCacheReqInput
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative import eagle_worker
from sglang.srt.speculative.accept_graphs import GREEDY_ACCEPT
from sglang.srt.speculative.draft_graphs import GREEDY
from sglang.test.engine_harness import EngineHarness

FIRST_ID = 3  # special tokens are below
WARM_UP = 4  # cycles that are not counted


class Accept:
    """Takes the place of ``num_new_tokens``: counts whose mean is ``set``.

    They are computed on the device of the sampled ids, so that a captured step counts as an eager one does.
    """

    def __init__(self) -> None:
        self.length = torch.ones(1)

    def set(self, length: float) -> None:
        with torch.inference_mode():  # as captured steps, which may have made it
            self.length.fill_(length)

    def __call__(self, drawn: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
        if self.length.device != drawn.device:  # before anything is captured
            self.length = self.length.to(drawn.device)
        length = self.length.clamp(1.0, float(drawn.shape[1]))
        coins = (drawn.sum(1) * 40503 % 8191) / 8191
        return (length.floor() + (coins < length - length.floor())).long()


def replay_ms(graphs: BucketGraphs[Any] | None, bucket: int, repeats: int = 20) -> float:
    """The median time of one replay on what is in its tensors now; NaN where there is no graph."""
    if graphs is None or graphs.bucket_of(bucket) != bucket:
        return math.nan
    return statistics.median(timed(lambda: graphs.run(bucket))[1] * 1e3 for _ in range(repeats))


def cycles_ms(engine: EngineHarness, size: int, args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """(ms per cycle, tokens per request and cycle) of ``size`` requests that all decode."""
    rng = np.random.default_rng((size, seed))
    for number in range(size):
        prompt = rng.integers(FIRST_ID, engine.model_config.vocab_size, size=args.input_len).tolist()
        params = SamplingParams(temperature=0.0, max_new_tokens=args.max_new, ignore_eos=True)
        engine.submit(f"{seed} {number}", prompt, params)
    metrics = engine.scheduler.metrics
    begun = metrics.num_decode_steps
    while metrics.num_decode_steps < begun + WARM_UP or len(engine.scheduler.running_reqs) < size:
        engine.step()
    tokens = metrics.num_generated_tokens
    _, seconds = timed(lambda: [engine.step() for _ in range(args.cycles)])
    tokens = metrics.num_generated_tokens - tokens
    engine.inbox.append(AbortReq(abort_all=True))
    engine.run()
    engine.scheduler._handle(FlushCacheReqInput(seq=0))
    engine.results.clear()
    return seconds / args.cycles * 1e3, tokens / args.cycles / size


def settled(engine: EngineHarness, size: int, args: argparse.Namespace) -> tuple[list[float], float]:
    """(ms per cycle of each run, tokens per request and cycle); the first run warms up."""
    found = [cycles_ms(engine, size, args, seed) for seed in range(args.runs + 1)][1:]
    return [ms for ms, _ in found], statistics.fmean(length for _, length in found)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def make_engine(args: argparse.Namespace, sizes: list[int], num_steps: int) -> EngineHarness:
    settings = asdict(ServerArgs.from_cli_args(args))
    settings |= {"cuda_graph_bs": sizes, "max_running_requests": max(sizes)}
    if num_steps:
        settings |= {"speculative_algorithm": "NEXTN", "speculative_num_steps": num_steps}
    started = time.perf_counter()
    engine = EngineHarness(settings.pop("model_path"), overlap=True, **settings)
    print(f"# {num_steps} drafts per step: ready in {time.perf_counter() - started:.1f} s", flush=True)
    return engine


def without(args: argparse.Namespace) -> tuple[dict[int, float], dict[int, float]]:
    """By batch size: ms of a replayed decode step, and ms per token through the scheduler."""
    wider = {size * (steps + 1) for size in args.batch_size for steps in args.steps}
    sizes = sorted({*args.batch_size, *wider})
    engine, replayed, per_token = make_engine(args, sizes, 0), {}, {}
    graphs = engine.runner.decode_graphs
    for size in sizes:
        cycles = settled(engine, size, args)[0] if size in args.batch_size else [cycles_ms(engine, size, args, 0)[0]]
        per_token[size] = statistics.median(cycles)
        replayed[size] = replay_ms(graphs, size)
        print(f"batch {size}: decode step {spread(cycles)} ms, its graph {replayed[size]:.3f} ms", flush=True)
    return replayed, per_token


def with_drafts(
    args: argparse.Namespace, num_steps: int, decode_graph: dict[int, float], plain: dict[int, float]
) -> None:
    accept = Accept()
    with mock.patch.object(eagle_worker, "num_new_tokens", accept):
        engine = make_engine(args, sorted(args.batch_size), num_steps)
        _with_drafts(args, engine, accept, decode_graph, plain)


def _with_drafts(
    args: argparse.Namespace,
    engine: EngineHarness,
    accept: Accept,
    decode_graph: dict[int, float],
    plain: dict[int, float],
) -> None:
    drafts = engine.worker.speculator.drafter.graphs  # type: ignore[union-attr]
    verify, width = engine.runner.decode_graphs, engine.worker.decode_kind.rows_per_request
    judged: Any = engine.worker.speculator.graphs  # type: ignore[union-attr]
    for size in args.batch_size:
        lines, cycle = [], 0.0
        for wanted in args.accept_length:
            accept.set(wanted)
            times, length = settled(engine, size, args)
            cycle = statistics.median(times)
            gain = plain[size] * length / cycle
            lines.append(f"  accept length {length:.2f}: cycle {spread(times)} ms, {cycle / length:.3f} ms per token, "
                         f"{gain:.2f}x of without")  # fmt: skip
        parts = {"verify": replay_ms(verify, size), "extend": replay_ms(drafts and drafts.extend_graphs, size)}
        parts["accept"] = replay_ms(judged and judged.kinds[GREEDY_ACCEPT], size)
        parts["chain"] = replay_ms(drafts and drafts.chains[GREEDY], size)
        wide = decode_graph[size * width]
        alone = ", ".join(f"{name} {ms:.3f}" for name, ms in parts.items())
        print(f"batch {size}, {width} rows per request: graphs alone {alone} ms")
        print(f"  verify over a decode step of {size * width} requests ({wide:.3f} ms): {parts['verify'] / wide:.3f}")
        print(f"  cycle over its graphs: {cycle / sum(parts.values()):.3f}; breaks even at {cycle / plain[size]:.2f}")
        print("\n".join(lines), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 1])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--accept-length", type=float, nargs="+", default=[1.0, 1.8, 2.6])
    parser.add_argument("--cycles", type=int, default=24)
    parser.add_argument("--runs", type=int, default=3)
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args()
    args.max_new = (args.cycles + WARM_UP + 64) * 4
    print(f"# {current_platform.describe()}", flush=True)
    decode_graph, plain = without(args)
    for num_steps in args.steps:
        gc.collect()
        if current_platform.kind != "cpu":
            torch.cuda.empty_cache()
        with_drafts(args, num_steps, decode_graph, plain)


if __name__ == "__main__":
    main()

"""Short prompt steps of one static batch, after a cached prefix: time, and how long the device was busy.

    python benchmark/step/bench_extend.py --model-path DIR/deepseek-v2-lite --load-format dummy
        [--batch-size 1 4] [--new-len 16 64 256 1024] [--prefix-len 0 4000] [--runs 5] [flags of the server]

Each request gets ``--new-len`` tokens after ``--prefix-len``; replayed where a graph takes the step, and launched, in
turns. The device is busy while one of its kernels runs, as the profiler sees it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from sglang.bench_utils.one_batch import StaticBatch
from sglang.bench_utils.one_batch_cli import load
from sglang.bench_utils.timing import timed
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.model_executor.extend_graphs import ExtendGraphs
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs, exit_with_errors
from sglang.srt.utils.logging_config import configure_logging
from sglang.test.device_time import launches

Result = TypeVar("Result")


class Case:
    """A step of ``size`` requests of ``new`` tokens each after ``prefix``."""

    def __init__(
        self, runner: ModelRunner, allocator: TokenToKVPoolAllocator, size: int, new: int, prefix: int
    ) -> None:
        self.runner, self.allocator, self.size, self.prefix = runner, allocator, size, prefix
        self.ids = np.random.default_rng(size).integers(0, runner.model_config.vocab_size, size=(size, prefix + new))
        self.name = f"{size} x {new} tokens after {prefix}"

    def run(self, measure: Callable[[Callable[[], object]], Result], graphs: ExtendGraphs | None) -> Result:
        """``measure`` the step, replayed by ``graphs`` if it has one that fits."""
        batch = StaticBatch(self.runner, self.allocator, self.size)
        if self.prefix:
            batch.extend(self.ids[:, : self.prefix].tolist())
        self.runner.extend_graphs = graphs
        try:
            return measure(partial(batch.extend, self.ids[:, self.prefix :].tolist()))
        finally:
            batch.release()

    def report(self, runs: int) -> str:
        """Both ways in turns, after one that warms up."""
        ways = {"captured": self.runner.extend_graphs, "launched": None}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(runs + 1):
            for name, graphs in ways.items():
                times[name].append(self.run(timed, graphs)[1] * 1e3)
        parts = []
        for name, graphs in ways.items():
            counted, (_, *each) = self.run(launches, graphs), times[name]
            busy, number = sum(us for _, _, us in counted) / 1e3, sum(count for _, count, _ in counted)
            spread = f"{statistics.median(each):.3f} ms ({min(each):.3f} .. {max(each):.3f})"
            parts.append(f"{name} {spread}, busy {busy:.3f} in {number} launches")
        self.runner.extend_graphs = ways["captured"]
        return f"{self.name}: " + "; ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--new-len", type=int, nargs="+", default=[16, 64, 256, 1024])
    parser.add_argument("--prefix-len", type=int, nargs="+", default=[0, 4000])
    parser.add_argument("--runs", type=int, default=5)
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        exit_with_errors(["this benchmark counts the launches of a GPU, and there is none"])
    server_args = ServerArgs.from_cli_args(args)
    configure_logging(server_args.log_level, "main")
    runner, allocator, _ = load(server_args, args.batch_size)
    print(f"# {current_platform.describe()}")
    with torch.inference_mode():
        for size, new, prefix in itertools.product(args.batch_size, args.new_len, args.prefix_len):
            print(Case(runner, allocator, size, new, prefix).report(args.runs), flush=True)


if __name__ == "__main__":
    main()

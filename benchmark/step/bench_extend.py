"""Short prompt steps of one static batch, after a cached prefix: time, and how long the device was busy.

    python benchmark/step/bench_extend.py --model-path DIR/deepseek-v2-lite --load-format dummy
        [--batch-size 1 4] [--new-len 16 64 256 1024] [--prefix-len 0 4000] [--runs 5] [flags of the server]

Each request gets ``--new-len`` tokens after ``--prefix-len``. The device is busy while one of its kernels runs, as the
profiler sees it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from functools import partial

import numpy as np
import torch

from sglang.bench_utils.one_batch import StaticBatch
from sglang.bench_utils.one_batch_cli import load
from sglang.bench_utils.timing import launches, timed
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs, exit_with_errors
from sglang.srt.utils.logging_config import configure_logging


def run_case(
    runner: ModelRunner, allocator: TokenToKVPoolAllocator, size: int, new: int, prefix: int, runs: int
) -> str:
    """The line of one size of step."""
    ids = np.random.default_rng(size).integers(0, runner.model_config.vocab_size, size=(size, prefix + new))
    times, counted = [], []
    for run in range(runs + 2):  # the first warms up, the last is counted
        batch = StaticBatch(runner, allocator, size)
        if prefix:
            batch.extend(ids[:, :prefix].tolist())
        step = partial(batch.extend, ids[:, prefix:].tolist())
        if run <= runs:
            times.append(timed(step)[1] * 1e3)
        else:
            counted = launches(step)
        batch.release()
    times = times[1:]
    busy, number = sum(us for _, _, us in counted) / 1e3, sum(count for _, count, _ in counted)
    spread = f"{statistics.median(times):.3f} ms ({min(times):.3f} .. {max(times):.3f})"
    return f"{size} x {new} tokens after {prefix}: {spread}, busy {busy:.3f} ms in {number} launches"


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
            print(run_case(runner, allocator, size, new, prefix, args.runs), flush=True)


if __name__ == "__main__":
    main()

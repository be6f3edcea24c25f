"""Does host work overlap the device: 20 ms of it after each decode step, with a device step stretched to 20 ms.

    python benchmark/overlap/bench_overlap.py [--steps 50] [--ms 20]

The real scheduler runs the embedded DeepSeek model, overlap on and off. A spin kernel keeps the device busy in each
step, and a spin keeps the host busy for each result. With overlap a step takes the longer of both, else the sum.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from sglang.bench_utils.timing import timed
from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.engine_harness import EngineHarness


def cycles_per_ms() -> float:
    """Spin-kernel cycles that take a millisecond."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 100_000_000
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / start.elapsed_time(end)


def spin(ms: float) -> None:
    end = time.perf_counter() + ms / 1e3
    while time.perf_counter() < end:
        pass


def run(overlap: bool, steps: int, ms: float, cycles: float) -> float:
    """Seconds of ``steps`` decode steps."""
    engine = EngineHarness(str(EMBEDDED_MODELS["deepseek-v2-tiny"]), overlap=overlap, max_total_tokens=4096)
    scheduler: Any = engine.scheduler
    worker: Any = engine.scheduler.worker
    forward, process = worker.forward, scheduler._process

    def slow_forward(*args: Any) -> Any:
        torch.cuda._sleep(int(ms * cycles))
        return forward(*args)

    def slow_process(*args: Any) -> None:
        spin(ms)
        process(*args)

    params = SamplingParams(temperature=0.0, max_new_tokens=steps + 6, ignore_eos=True)
    engine.submit("r", [5, 6, 7], params)
    for _ in range(4):
        engine.step()
    worker.forward, scheduler._process = slow_forward, slow_process
    return timed(lambda: [engine.step() for _ in range(steps)])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--ms", type=float, default=20.0)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this bench needs a GPU")
    cycles = cycles_per_ms()
    print(f"# {current_platform.describe()}")
    for overlap in (True, False):
        taken = run(overlap, args.steps, args.ms, cycles)
        print(f"overlap {'on ' if overlap else 'off'}: {args.steps} steps in {taken:.2f} s")


if __name__ == "__main__":
    main()

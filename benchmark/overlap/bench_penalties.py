"""What one penalised request costs the others: decode throughput of a batch with one and with none, alternately.

    python benchmark/overlap/bench_penalties.py [--model-path DIR --load-format dummy] [--batch-size 32] [--rounds 9]

The real scheduler runs with overlap, without sockets, in one process. Each round decodes the same prompts once without
and once with one penalised request (the order alternates); printed are tokens/s and the ratio of the pairs with its
95 % interval. Target: 0.98.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.engine_harness import EngineHarness
from sglang.test.paired import paired_ratio, rounds_within

PENALTIES: dict[str, Any] = {"frequency_penalty": 0.3, "presence_penalty": 0.2, "repetition_penalty": 1.1}


class Rounds:
    """Decodes ``batch_size`` requests for ``steps`` steps, repeatedly on one engine."""

    def __init__(self, engine: EngineHarness, batch_size: int, steps: int, clock: str) -> None:
        self._engine = engine
        self._batch_size = batch_size
        self._steps = steps
        self._clock = time.process_time if clock == "cpu" else time.perf_counter
        self._number = 0

    def run(self, penalised: bool) -> float:
        """Seconds of the decode steps, once all prompts are computed."""
        engine, self._number = self._engine, self._number + 1
        for index in range(self._batch_size):
            edits: dict[str, Any] = PENALTIES if penalised and index == self._batch_size // 2 else {}
            params = SamplingParams(temperature=0.0, max_new_tokens=self._steps + 8, ignore_eos=True, **edits)
            prompt = [3 + (self._number * 31 + index * 7 + i) % 200 for i in range(24)]
            engine.submit(f"{self._number}-{index}", prompt, params)
        while len(engine.scheduler.running_reqs) < self._batch_size:
            engine.step()
        engine.step()
        current_platform.synchronize()
        began = self._clock()
        for _ in range(self._steps):
            engine.step()
        current_platform.synchronize()
        taken = self._clock() - began
        assert len(engine.scheduler.running_reqs) == self._batch_size
        engine.run()
        return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", default=str(EMBEDDED_MODELS["deepseek-v2-tiny"]))
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=600.0, help="Fewer rounds where they take longer than this.")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine without a GPU")
    args = parser.parse_args()
    engine = EngineHarness(
        args.model_path, overlap=True, load_format=args.load_format, max_running_requests=args.batch_size
    )
    rounds = Rounds(engine, args.batch_size, args.steps, args.clock)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in rounds_within(args.rounds, args.seconds):
        for penalised in (number % 2 == 0, number % 2 == 1):
            taken = rounds.run(penalised)
            if number:  # the first one: compilers, allocators
                seconds[penalised].append(taken)
    print(f"# {current_platform.describe()}, vocabulary {engine.model_config.vocab_size}, batch {args.batch_size}")
    for penalised, name in ((False, "none penalised"), (True, "one penalised ")):
        rates = [args.batch_size * args.steps / taken for taken in seconds[penalised]]
        print(f"{name}: {statistics.median(rates):,.0f} tokens/s ({min(rates):,.0f} .. {max(rates):,.0f})")
    print(f"throughput with one penalised over none: {paired_ratio(seconds[True], seconds[False])}")


if __name__ == "__main__":
    main()

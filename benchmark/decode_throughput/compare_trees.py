"""Decode throughput of one tree of this engine against another one, on a bare CPU, in paired turns.

    git archive e9a0e68 | tar x -C /tmp/old
    python benchmark/decode_throughput/compare_trees.py /tmp/old . [--batch-size 1 8 32 64] [--minutes 7] [--bar 1.03]

Both engines are up at the same time, each in processes of its own tree, and take turns: within a pair both get the
same new prompts, and the side that begins changes from pair to pair. A turn is as many batches as fill --turn-seconds.
Prints for each batch size the time of the new tree over that of the old one: the geometric mean of the pairs with its
95 % interval, and the median. Exit status 1 when the upper end of an interval is above the bar, or when tokens differ.
The first pair of a start warms up. The placement of memory differs from start to start, and with it the speed by some
percent. With the same tree twice it shows the noise of the machine. On a busy machine
``--measure cpu`` compares the CPU time of all processes of a side instead; the other of the two is printed too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # an old tree that this file serves has no such modules
    from sglang.test.paired import Ratio
    from sglang.test.tree_process import TreeProcess

INPUT_LEN = OUTPUT_LEN = 64
MAX_PAIRS = 1000
MEASURES = ("wall", "cpu")
FIRST_ID = 2  # special tokens are below


def serve(folder: str, max_batch: int) -> None:
    """One side: a line on stdin is a list of batches of prompts; the reply has seconds, CPU seconds and output ids."""
    import psutil

    import sglang

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's prints are not replies
    limits: dict[str, Any] = {"max_running_requests": max_batch, "max_total_tokens": 4 * max_batch * 128}
    sampling = {"temperature": 0.0, "max_new_tokens": OUTPUT_LEN, "ignore_eos": True}

    def cpu_seconds() -> float:
        me = psutil.Process()
        return sum(each.cpu_times().user + each.cpu_times().system for each in (me, *me.children(recursive=True)))

    with sglang.Engine(model_path=folder, log_level="error", **limits) as engine:
        print(json.dumps(sglang.__file__), file=answers, flush=True)
        for line in sys.stdin:
            batches, ids = json.loads(line), []
            engine.flush_cache()
            started, used = time.perf_counter(), cpu_seconds()
            for prompts in batches:
                ids.append([r["output_ids"] for r in engine.generate(input_ids=prompts, sampling_params=sampling)])
            answer = [time.perf_counter() - started, cpu_seconds() - used, ids]
            print(json.dumps(answer), file=answers, flush=True)


class Size:
    """The pairs of one batch size."""

    def __init__(self, batch_size: int, measure: str, turn_s: float) -> None:
        self.batch_size = batch_size
        self.measured = MEASURES.index(measure)
        self.turn_s = turn_s
        self.batches_per_turn = 1
        self.others: list[tuple[float, float]] = []  # the same for the other measure
        self.pairs: list[tuple[float, float]] = []  # seconds of a batch: old, new
        self.num_differing = 0

    def pair(self, sides: list[TreeProcess], vocab: int, start: int, number: int) -> None:
        """One turn of each side; pair 0 of a start warms up and decides how many batches a turn has."""
        import numpy as np

        rng = np.random.default_rng((self.batch_size, start, number))
        shape = (self.batches_per_turn, self.batch_size, INPUT_LEN)
        batches = rng.integers(FIRST_ID, vocab, size=shape).tolist()
        order = (0, 1) if number % 2 else (1, 0)
        found = {index: sides[index].run(batches) for index in order}
        self.num_differing += found[0][2] != found[1][2]
        seconds = [[found[index][measure] / len(batches) for index in (0, 1)] for measure in range(len(MEASURES))]
        old, new = seconds[self.measured]
        if number:
            self.pairs.append((old, new))
            self.others.append(tuple(seconds[1 - self.measured]))
        else:
            self.batches_per_turn = max(1, round(self.turn_s / min(old, new)))

    def last(self) -> str:
        """New over old in the newest pair."""
        return f"{self.pairs[-1][1] / self.pairs[-1][0]:.3f}" if self.pairs else "-"

    def ratio(self) -> Ratio:
        """New over old."""
        from sglang.test.paired import paired_ratio

        return paired_ratio(*zip(*self.pairs, strict=True))

    def line(self, bar: float) -> str:
        from sglang.test.paired import paired_ratio

        ratio = self.ratio()
        rates = [self.batch_size * OUTPUT_LEN / statistics.median(times) for times in zip(*self.pairs, strict=True)]
        median = statistics.median(new / old for old, new in self.pairs)
        tokens = f"{self.num_differing} pairs WITH OTHER TOKENS" if self.num_differing else "same tokens"
        return (
            f"batch {self.batch_size:3d}: {MEASURES[self.measured]} time new/old {ratio}, median {median:.4f}, "
            f"{MEASURES[1 - self.measured]} time {paired_ratio(*zip(*self.others, strict=True))}, "
            f"{len(self.pairs)} pairs; old {rates[0]:,.0f}, new {rates[1]:,.0f} tokens/s; {tokens}; "
            f"bar {bar}: {'met' if ratio.high <= bar else 'MISSED'}"
        )


def main() -> int:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="Folder of a tree, with python/sglang in it.")
    parser.add_argument("new", type=Path)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--minutes", type=float, default=7.0, help="Start-up included. Default: 7.")
    parser.add_argument("--bar", type=float, default=1.03, help="For the upper end of new/old. Default: 1.03.")
    parser.add_argument("--measure", choices=MEASURES, default="wall", help="Default: wall.")
    parser.add_argument("--starts", type=int, default=3, help="Of both engines, one after the other. Default: 3.")
    parser.add_argument("--turn-seconds", type=float, default=1.0, help="Default: 1.")
    parser.add_argument("--checkpoint", type=Path, help="Folder for the model. Default: a temporary folder.")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    from sglang.test.bench_checkpoint import CONFIG, make_checkpoint
    from sglang.test.device_time import describe_machine
    from sglang.test.paired import rounds_within
    from sglang.test.tree_process import TreeProcess

    with tempfile.TemporaryDirectory() as temporary:
        folder = make_checkpoint(args.checkpoint or Path(temporary))
        print(f"{describe_machine()}; {INPUT_LEN} tokens in, {OUTPUT_LEN} out; {args.measure} time", flush=True)
        sizes = [Size(batch_size, args.measure, args.turn_seconds) for batch_size in args.batch_size]
        for start in range(args.starts):
            until = time.monotonic() + (end - time.monotonic()) / (args.starts - start)
            command = [__file__, "--serve", str(folder), str(max(args.batch_size))]
            sides = [TreeProcess(tree, command) for tree in (args.old, args.new)]
            for number in rounds_within(MAX_PAIRS, until - time.monotonic()):
                for size in sizes:
                    size.pair(sides, CONFIG["vocab_size"], start, number)
                print(f"pair {number}:", *(size.last() for size in sizes), flush=True)
            for side in sides:
                side.close()
    for size in sizes:
        print(size.line(args.bar), flush=True)
    return int(any(size.ratio().high > args.bar or size.num_differing for size in sizes))


if __name__ == "__main__":
    sys.exit(main())

"""Decode and prefill of one tree of this engine against another one on the same GPU, in paired turns.

    git archive e9a0e68 | tar x -C /tmp/old
    python benchmark/engine/compare_engines.py /tmp/old . [--through engine one] [--batch-size 1 8 32] [--pairs 5]
        --model-path DIR/deepseek-v3-4l-fp8 --load-format dummy [flags of the server that both trees have]

Both models are in the memory of the card at the same time, so give --mem-fraction-static. The side that begins changes
from pair to pair, both get the same new random prompts, and the first pair warms up. ``--through engine`` is the
offline Engine: prefill is the time of a first token, and decode steps are those after a prompt in the prefix cache,
greedy and at temperature 1. ``--through one`` is a static batch without a scheduler, fed with random tokens. Prints
ms per decode step and thousand prefill tokens/s of each tree (median), and new over old in ms: geometric mean and 95 %
interval.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

FIRST_ID = 3  # special tokens are below
STEPS = 48
PREFILL_TOKENS = 32_768  # of one step of a static batch
THROUGH = ("engine", "one")

Measure = Callable[[int, int, int], dict[str, float]]


def random_ids(vocab: int, seed: int, shape: tuple[int, ...]) -> Any:
    """Token ids that depend on the seed and the shape."""
    import numpy as np

    return np.random.default_rng((seed, *shape)).integers(FIRST_ID, vocab, size=shape)


def engine_measure(args: Any) -> Measure:
    """Seconds of a prefill, and of a decode step at temperature 0 and 1, through the offline Engine."""
    from sglang.srt.entrypoints.engine import Engine

    engine = Engine(**asdict(args))
    vocab = engine.get_server_info()["vocab_size"]

    def seconds(prompts: list[list[int]], new_tokens: int, temperature: float) -> float:
        sampling = {"temperature": temperature, "max_new_tokens": new_tokens, "ignore_eos": True}
        started = time.perf_counter()
        engine.generate(input_ids=prompts, sampling_params=sampling)
        return time.perf_counter() - started

    def measure(size: int, length: int, seed: int) -> dict[str, float]:
        engine.flush_cache()
        prompts = random_ids(vocab, seed, (size, length)).tolist()
        found = {"prefill": seconds(prompts, 1, 0.0)}
        seconds(prompts, 1, 0.0)  # fills the prefix cache: states are cached at fewer places than KV
        for name, temperature in (("greedy step", 0.0), ("step at T=1", 1.0)):
            once = seconds(prompts, 1, temperature)
            found[name] = (seconds(prompts, 1 + STEPS, temperature) - once) / STEPS
        return found

    return measure


def one_measure(args: Any) -> Measure:
    """Seconds of a prefill and of a decode step of a static batch."""
    import torch

    from sglang.bench_utils.one_batch import StaticBatch
    from sglang.bench_utils.one_batch_cli import load

    runner, allocator, _ = load(args, [args.max_running_requests])
    vocab = runner.model_config.vocab_size

    def measure(size: int, length: int, seed: int) -> dict[str, float]:
        prompts = random_ids(vocab, seed, (size, length))
        ids = torch.from_numpy(random_ids(vocab, seed, (STEPS + 4, size))).to("cuda")
        batch = StaticBatch(runner, allocator, size)
        cut = max(1, min(length, PREFILL_TOKENS // size))
        torch.cuda.synchronize()
        started = time.perf_counter()
        for first in range(0, length, cut):
            batch.extend(list(prompts[:, first : first + cut]))
        torch.cuda.synchronize()
        prefill = time.perf_counter() - started
        for row in ids[STEPS:]:
            batch.decode(row)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for row in ids[:STEPS]:
            batch.decode(row)
        torch.cuda.synchronize()
        step = (time.perf_counter() - started) / STEPS
        batch.release()
        return {"prefill": prefill, "step": step}

    return measure


def serve(through: str, flags: list[str]) -> None:
    """One side: a line on stdin is [batch size, prompt length, seed]; the reply is seconds by name."""
    import sglang
    from sglang.srt.server_args import ServerArgs

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the engine's prints are not replies
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = ServerArgs.from_cli_args(parser.parse_args(flags))
    print(json.dumps(sglang.__file__), file=answers, flush=True)
    measure = engine_measure(args) if through == "engine" else one_measure(args)
    for line in sys.stdin:
        print(json.dumps(measure(*json.loads(line))), file=answers, flush=True)


def compare(args: argparse.Namespace, through: str, flags: list[str]) -> None:
    """Start both sides, let them take turns, and print a line for each size and time."""
    from sglang.test.paired import paired_ratio
    from sglang.test.tree_process import TreeProcess

    command = [__file__, "--serve", through, *flags, "--max-running-requests", str(max(args.batch_size))]
    sides = [TreeProcess(tree, command) for tree in (args.old, args.new)]
    for size in args.batch_size:
        pairs: dict[str, list[tuple[float, float]]] = {}
        for number in range(args.pairs + 1):
            order = (0, 1) if number % 2 else (1, 0)
            found = {index: sides[index].run([size, args.input_len, number]) for index in order}
            for name in found[0] if number else ():
                pairs.setdefault(name, []).append((found[0][name], found[1][name]))
        for name, times in pairs.items():
            medians = [statistics.median(side) for side in zip(*times, strict=True)]
            shown = (
                [f"{size * args.input_len / value / 1e3:.1f} k tokens/s" for value in medians]
                if name == "prefill"
                else [f"{value * 1e3:.3f} ms" for value in medians]
            )
            ratio = paired_ratio(*zip(*times, strict=True))
            print(f"{through}, batch {size}, {name}: old {shown[0]}, new {shown[1]}; new/old {ratio}", flush=True)
    for side in sides:
        side.close()


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="Folder of a tree, with python/sglang in it.")
    parser.add_argument("new", type=Path)
    parser.add_argument("--through", nargs="+", choices=THROUGH, default=list(THROUGH), help="Default: both.")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=5, help="At least 4. Default: 5.")
    args, flags = parser.parse_known_args()
    from sglang.srt.platforms import current_platform
    from sglang.test.paired import MIN_PAIRS

    if args.pairs < MIN_PAIRS:
        parser.error(f"an interval needs at least {MIN_PAIRS} pairs, --pairs is {args.pairs}")

    print(f"# {current_platform.describe()}; {' '.join(flags)}; {args.input_len} tokens in", flush=True)
    for through in args.through:
        compare(args, through, flags)


if __name__ == "__main__":
    main()

"""Milliseconds per token and prefill tokens/s through the offline Engine, batch by batch.

    python benchmark/engine/bench_engine.py --model-path DIR/deepseek-v2-lite --load-format dummy
        --batch-size 1 8 32 128 [--input-len 1024] [--output-len 128] [--runs 3] [flags of the server]

Each run sends a batch twice, for 1 token and for ``output-len``, with new random prompts and greedy choice; the
difference over the tokens between is the time a token, the first gives prefill. The first run warms up and is not
counted. Prints how long the engine took to be ready.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict

import numpy as np

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs

FIRST_ID = 3  # special tokens are below


def seconds(engine: Engine, prompts: list[list[int]], new_tokens: int) -> float:
    started = time.perf_counter()
    engine.generate(
        input_ids=prompts, sampling_params={"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}
    )
    return time.perf_counter() - started


def measure(engine: Engine, size: int, vocab: int, args: argparse.Namespace, seed: int) -> tuple[float, float]:
    """(ms per token, prefill tokens/s) of one run."""
    rng = np.random.default_rng((size, seed))
    engine.flush_cache()

    def prompts() -> list[list[int]]:
        return rng.integers(FIRST_ID, vocab, size=(size, args.input_len)).tolist()

    one = seconds(engine, prompts(), 1)
    whole = seconds(engine, prompts(), args.output_len)
    return (whole - one) / (args.output_len - 1) * 1e3, size * args.input_len / one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1])
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args()
    began = time.perf_counter()
    with Engine(**asdict(ServerArgs.from_cli_args(args))) as engine:
        print(f"# {current_platform.describe()}; ready in {time.perf_counter() - began:.1f} s")
        vocab = engine.get_server_info()["vocab_size"]
        for size in args.batch_size:
            runs = [measure(engine, size, vocab, args, seed) for seed in range(args.runs + 1)][1:]
            tpot, prefill = ([run[i] for run in runs] for i in (0, 1))
            print(
                f"batch {size}: {statistics.median(tpot):.3f} ms per token ({min(tpot):.3f} .. {max(tpot):.3f} over "
                f"{args.runs} runs); prefill {statistics.median(prefill):,.0f} tok/s "
                f"({min(prefill):,.0f} .. {max(prefill):,.0f})"
            )


if __name__ == "__main__":
    main()

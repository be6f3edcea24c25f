"""Throughput of the engine without HTTP: all prompts at once through sglang.Engine.

    python -m sglang.bench_offline_throughput --num-prompts 100 --dataset-name random --random-input-len 64

Every flag of launch_server is accepted too; without --model-path the embedded model is used.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sglang.bench_utils.datasets import DatasetError, DatasetRow, add_dataset_arguments, get_dataset
from sglang.bench_utils.metrics import BLOCK_WIDTH, block_row
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.process_launch import LaunchError
from sglang.srt.server_args import ServerArgs, ServerArgsError, exit_with_errors
from sglang.srt.utils.hf_tokenizer import Tokenizer, TokenizerError

WARMUP_PROMPTS = 16
WARMUP_OUTPUT_LEN = 16


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="engine", choices=("engine",), help="Default: engine.")
    parser.add_argument("--result-filename", default="", help="JSONL file to append to. Default: none.")
    parser.add_argument("--skip-warmup", action="store_true")
    parser.add_argument("--disable-ignore-eos", action="store_true", help="Let the end token end an output.")
    add_dataset_arguments(parser)
    ServerArgs.add_cli_args(parser)
    return parser


def generate_all(engine: Engine, rows: Sequence[DatasetRow], ignore_eos: bool) -> tuple[list[dict[str, Any]], float]:
    """(replies, seconds) of all prompts sent as one batch."""
    sampling = [{"temperature": 0.0, "max_new_tokens": row.output_len, "ignore_eos": ignore_eos} for row in rows]
    is_text = isinstance(rows[0].prompt, str)
    prompts: Any = [row.prompt for row in rows]
    started = time.perf_counter()
    replies = engine.generate(**{"prompt" if is_text else "input_ids": prompts}, sampling_params=sampling)
    return replies, time.perf_counter() - started


def run(args: argparse.Namespace, server_args: ServerArgs) -> dict[str, Any]:
    """Measure, print the block and return the record."""
    with Engine(**asdict(server_args)) as engine:
        resolved = engine.server_args
        rows = get_dataset(args, Tokenizer.from_path(resolved.tokenizer_path or resolved.model_path))
        if not args.skip_warmup:
            short = [DatasetRow(row.prompt, row.prompt_len, WARMUP_OUTPUT_LEN) for row in rows[:WARMUP_PROMPTS]]
            generate_all(engine, short, True)
            engine.flush_cache()
        replies, seconds = generate_all(engine, rows, not args.disable_ignore_eos)
        states = engine.get_server_info()["internal_states"]
    inputs = sum(row.prompt_len for row in rows)
    outputs = sum(reply["meta_info"]["completion_tokens"] for reply in replies)
    figures = (
        ("Backend:", "backend", args.backend),
        ("Successful requests:", "successful_requests", len(replies)),
        ("Benchmark duration (s):", "total_latency", seconds),
        ("Total input tokens:", "total_input_tokens", inputs),
        ("Total generated tokens:", "total_output_tokens", outputs),
        ("Last generation throughput (tok/s):", "last_gen_throughput", sum(s["last_gen_throughput"] for s in states)),
        ("Request throughput (req/s):", "request_throughput", len(replies) / seconds),
        ("Input token throughput (tok/s):", "input_throughput", inputs / seconds),
        ("Output token throughput (tok/s):", "output_throughput", outputs / seconds),
        ("Total token throughput (tok/s):", "total_throughput", (inputs + outputs) / seconds),
    )
    print(f"\n{' Offline Throughput Benchmark Result ':=^{BLOCK_WIDTH}}")
    for label, _, value in figures:
        print(block_row(label, value))
    print("=" * BLOCK_WIDTH)
    return {key: value for _, key, value in figures}


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    try:
        record = run(args, ServerArgs.from_cli_args(args))
    except ServerArgsError as error:
        exit_with_errors(error.errors)
    except (DatasetError, LaunchError, TokenizerError, ValueError) as error:
        exit_with_errors([str(error)])
    if args.result_filename:
        with open(args.result_filename, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

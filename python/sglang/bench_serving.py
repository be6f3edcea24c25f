"""Measure a running server: latencies and throughput under a chosen load.

    python -m sglang.bench_serving --dataset-name random --random-input-len 128 --random-output-len 64 --num-prompts 100

Requests are greedy and generate their full length unless --disable-ignore-eos is given. A record is appended to the
file of --output-file as one line of JSON. The exit status is 1 if no request succeeded, 2 if nothing could be measured.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sglang.bench_utils.clients import (
    BACKENDS,
    UPSTREAM_ONLY_BACKENDS,
    BenchmarkError,
    ServerControl,
    Target,
    make_client,
    send_request,
)
from sglang.bench_utils.datasets import DatasetError, DatasetRow, add_dataset_arguments, get_dataset, length_settings
from sglang.bench_utils.metrics import (
    RequestOutput,
    RunInfo,
    accept_length,
    calculate_metrics,
    result_block,
    result_details,
    result_record,
)
from sglang.srt.utils.hf_tokenizer import Tokenizer, TokenizerError

WARMUP_OUTPUT_LEN = 32
# Flags of upstream whose effect the server or the client lacks, and why.
REFUSED = {
    "--profile-by-stage": "a profile holds all steps",
    "--profile-output-dir": "traces go to the server's --profile-dir",
    "--pd-separated": "prefill and decode run in one server",
    "--lora-name": "the server has no LoRA adapters",
}


class _Refuse(argparse.Action):
    """A flag of upstream that would change what is measured."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        flag = self.option_strings[0]
        parser.error(f"{flag} is known from upstream but not implemented here: {REFUSED[flag]}. Drop it.")


def _header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r}")
    return value


def make_parser() -> argparse.ArgumentParser:
    """Upstream's flags; abbreviations such as --random-input work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backend", default="sglang", choices=(*BACKENDS, *UPSTREAM_ONLY_BACKENDS), metavar="NAME",
        help=f"One of {', '.join(BACKENDS)}: /generate, /v1/completions, /v1/chat/completions. Default: sglang.",
    )  # fmt: skip
    parser.add_argument("--base-url", help="Server, such as http://127.0.0.1:30000; overrides --host and --port.")
    parser.add_argument("--host", default="0.0.0.0", help="Default: this machine.")
    parser.add_argument("--port", type=int, default=30000, help="Default: 30000.")
    parser.add_argument("--model", help="Model name to send, or a checkpoint folder. Default: asked of the server.")
    parser.add_argument("--served-model-name", help="Model name to send, where --model is a folder.")
    parser.add_argument("--tokenizer", help="Local folder. Default: --model if it is one, else asked of the server.")
    add_dataset_arguments(parser)
    parser.add_argument("--request-rate", type=float, default=float("inf"),
                        help="Requests per second, Poisson arrivals. Default: all at once.")  # fmt: skip
    parser.add_argument("--max-concurrency", type=int, help="Requests in flight at most. Default: no limit.")
    parser.add_argument("--warmup-requests", type=int, default=1, help="Requests before the clock starts. Default: 1.")
    parser.add_argument("--flush-cache", action="store_true", help="Empty the prefix cache after the warm-up.")
    parser.add_argument("--disable-ignore-eos", action="store_true", help="Let the end token end an output.")
    parser.add_argument("--disable-stream", action="store_true", help="Whole replies: TTFT is then the latency.")
    parser.add_argument("--disable-tqdm", action="store_true", help="No progress bar.")
    parser.add_argument("--extra-request-body", type=_json_object, default={}, metavar="JSON",
                        help="Merged into the body of each request.")  # fmt: skip
    parser.add_argument("--header", type=_header, nargs="+", default=[], metavar="NAME=VALUE",
                        help='HTTP headers, such as "Authorization=Bearer KEY".')  # fmt: skip
    parser.add_argument("--ready-check-timeout-sec", type=int, default=60, help="Wait for the server. Default: 60.")
    parser.add_argument("--profile", action="store_true", help="Have the server trace the run, to its --profile-dir.")
    parser.add_argument("--profile-steps", type=int, help="End the trace after so many steps. Default: with the run.")
    parser.add_argument("--tag", help="Copied into the record.")
    parser.add_argument("--output-file", help="JSONL file to append to. Default: named after the run.")
    parser.add_argument("--output-details", action="store_true", help="Add each request's times and text.")
    for flag in REFUSED:
        parser.add_argument(flag, action=_Refuse, nargs="*", help=argparse.SUPPRESS)
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse by name what cannot be measured."""
    if args.backend in UPSTREAM_ONLY_BACKENDS:
        parser.error(
            f"--backend {args.backend} is known from upstream but not implemented here: use {', '.join(BACKENDS)}"
        )
    if not args.request_rate > 0:
        parser.error(f"--request-rate must be above 0, got {args.request_rate}")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        parser.error(f"--max-concurrency must be at least 1, got {args.max_concurrency}")
    if args.warmup_requests < 0:
        parser.error(f"--warmup-requests must be at least 0, got {args.warmup_requests}")
    if args.tokenize_prompt and args.backend == "sglang-oai-chat":
        parser.error("--tokenize-prompt sends ids, and chat messages are text: use --backend sglang or sglang-oai")


def base_url_of(args: argparse.Namespace) -> str:
    """The server's address without a trailing slash; an unspecified host means this machine."""
    if args.base_url:
        return args.base_url.rstrip("/")
    host = "127.0.0.1" if args.host == "0.0.0.0" else args.host
    return f"http://[{host}]:{args.port}" if ":" in host else f"http://{host}:{args.port}"


async def arrivals(rows: Sequence[DatasetRow], rate: float, rng: np.random.Generator) -> AsyncIterator[DatasetRow]:
    """Yield the requests as they arrive: all at once, or a Poisson process of ``rate`` per second.

    Waiting is counted from the start, so that a slow client does not lower the rate.
    """
    started = time.perf_counter()
    due = 0.0
    for index, row in enumerate(rows):
        if index and np.isfinite(rate):
            due += rng.exponential(1.0 / rate)
            await asyncio.sleep(max(0.0, started + due - time.perf_counter()))
        yield row


async def _locate(args: argparse.Namespace, control: ServerControl) -> tuple[str, Tokenizer]:
    """(model name to send, tokenizer): what the flags leave open is read from the server."""
    info = await control.try_get("/model_info")
    model = args.served_model_name or args.model
    if model is None:
        cards = (await control.get("/v1/models")).get("data") or []
        if not cards:
            raise BenchmarkError("/v1/models lists no model: name one with --model")
        model = cards[0]["id"]
    local = args.model if args.model and Path(args.model).is_dir() else None
    folder = args.tokenizer or local or info.get("tokenizer_path") or info.get("model_path")
    if not folder or not Path(folder).exists():
        raise BenchmarkError(
            f"no tokenizer: {folder or 'nothing named'} is not a local folder. Give one with --tokenizer; nothing is "
            "downloaded"
        )
    return model, Tokenizer.from_path(folder)


async def _warm_up(send: Any, row: DatasetRow, count: int) -> None:
    if count == 0:
        return
    short = replace(row, output_len=min(row.output_len, WARMUP_OUTPUT_LEN))
    for output in await asyncio.gather(*(send(short) for _ in range(count))):
        if not output.success:
            raise BenchmarkError(f"the warm-up request failed: {output.error}")


async def _measure(args: argparse.Namespace, send: Any, rows: list[DatasetRow]) -> tuple[list[RequestOutput], float]:
    """(outputs in the order of ``rows``, seconds from the first request to the last reply)."""
    gate = asyncio.Semaphore(args.max_concurrency) if args.max_concurrency else None
    bar = None if args.disable_tqdm else tqdm(total=len(rows))

    async def limited(row: DatasetRow) -> RequestOutput:
        if gate is None:
            output = await send(row)
        else:
            async with gate:
                output = await send(row)
        if bar is not None:
            bar.update(1)
        return output

    started = time.perf_counter()
    tasks = []
    async for row in arrivals(rows, args.request_rate, np.random.default_rng([args.seed, 1])):
        tasks.append(asyncio.create_task(limited(row)))
    outputs = await asyncio.gather(*tasks)
    duration = time.perf_counter() - started
    if bar is not None:
        bar.close()
    return outputs, duration


async def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Run the load of ``args``, print and return its record. Raises BenchmarkError, DatasetError or TokenizerError."""
    base_url = base_url_of(args)
    async with make_client(dict(args.header), args.max_concurrency) as client:
        control = ServerControl(client, base_url)
        await control.wait_until_ready(args.ready_check_timeout_sec)
        model, tokenizer = await _locate(args, control)
        rows = get_dataset(args, tokenizer)
        server_info = await control.try_get("/server_info")
        target = Target(
            args.backend, base_url, model, not args.disable_stream, not args.disable_ignore_eos,
            args.extra_request_body, bool(server_info.get("incremental_streaming_output")),
        )  # fmt: skip

        async def send(row: DatasetRow) -> RequestOutput:
            return await send_request(client, target, row)

        await _warm_up(send, rows[0], args.warmup_requests)
        if args.flush_cache:
            await control.post("/flush_cache")
        if args.profile:
            print(await control.post("/start_profile", {"num_steps": args.profile_steps}))
        before = await control.try_get("/server_info")
        outputs, duration = await _measure(args, send, rows)
        if args.profile and args.profile_steps is None:
            print(await control.post("/stop_profile"))
        server_info = await control.try_get("/server_info")
    length = accept_length(before.get("internal_states") or (), server_info.get("internal_states") or ())
    return _report(args, outputs, duration, tokenizer, server_info, length)


def _report(
    args: argparse.Namespace,
    outputs: list[RequestOutput],
    duration: float,
    tokenizer: Tokenizer,
    server_info: dict[str, Any],
    accepted: float | None,
) -> dict[str, Any]:
    retokenized = [len(tokenizer.encode(output.text, add_special_tokens=False)) for output in outputs]
    metrics = calculate_metrics(outputs, duration, retokenized)
    info = RunInfo(
        args.backend, args.dataset_name, args.request_rate, args.max_concurrency, args.tag, length_settings(args),
        server_info or None, accepted,
    )  # fmt: skip
    print(result_block(info, metrics))
    failed = [output.error for output in outputs if not output.success]
    if failed:
        print(f"{len(failed)} of {len(outputs)} requests failed and count nowhere: {failed[0]}", file=sys.stderr)
    record = result_record(info, metrics)
    if args.output_details:
        record.update(result_details(outputs))
    return record


def run_benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """As ``benchmark``, and append the record to the output file."""
    record = asyncio.run(benchmark(args))
    path = args.output_file or f"{args.backend}_{datetime.now():%m%d}_{args.num_prompts}_{args.dataset_name}.jsonl"
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    try:
        record = run_benchmark(args)
    except (BenchmarkError, DatasetError, TokenizerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if record["completed"] else 1


if __name__ == "__main__":
    sys.exit(main())

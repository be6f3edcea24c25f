"""The timed runs of bench_one_batch, and its correctness test."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sglang.bench_utils.one_batch import BatchTooLargeError, SpeculatingBatch, StaticBatch
from sglang.bench_utils.timing import timed
from sglang.kernels.registry import REGISTRY
from sglang.srt.arg_groups.plan import evaluate
from sglang.srt.managers.scheduler_process import USER_ERRORS
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner_build import make_runner
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs, ServerArgsError, exit_with_errors, set_global_server_args_for_scheduler
from sglang.srt.speculative.draft_utils import make_speculator
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.srt.utils.logging_config import configure_logging

DECODE_STEPS_PRINTED = 5
WARMUP_OUTPUT_LEN = 8
CORRECTNESS_PROMPTS = ("The capital of France is", "27+58=", "Today is a sunny day and I like")


def load(args: ServerArgs, batch_sizes: Sequence[int]) -> tuple[ModelRunner, TokenToKVPoolAllocator, ServerArgs]:
    """Resolve ``args`` for batches of these sizes and load the model; exits with status 2 if they cannot be used."""
    if args.tp_size > 1:
        exit_with_errors([f"--tp-size {args.tp_size}: this tool runs one rank; use bench_serving for more"])
    if args.max_running_requests is None:
        args = replace(args, max_running_requests=max(64, *batch_sizes))
    plan = evaluate(args)
    if plan.errors or plan.model_config is None:
        exit_with_errors(plan.errors)
    assert plan.model_config is not None
    set_global_server_args_for_scheduler(plan.args)
    REGISTRY.freeze()
    runner = make_runner(plan.args, plan.model_config)
    memory = runner.memory
    return runner, TokenToKVPoolAllocator(runner.pools.size(), memory.page_size, memory.window), plan.args


def make_prompts(args: argparse.Namespace, tokenizer_path: str, vocab: int, count: int, length: int) -> np.ndarray:
    """Prompts [count, length] int64: random ids, or the lines of a file cut or repeated to the length."""
    if not args.prompt_filename:
        return np.random.default_rng(0).integers(0, vocab, size=(count, length))
    lines = [line for line in Path(args.prompt_filename).read_text(encoding="utf-8").splitlines() if line]
    if not lines:
        exit_with_errors([f"--prompt-filename {args.prompt_filename} contains no prompt"])
    tokenizer = Tokenizer.from_path(tokenizer_path)
    encoded = [tokenizer.encode(line) for line in lines]
    chosen = itertools.islice(itertools.cycle(encoded), count)
    return np.array([list(itertools.islice(itertools.cycle(ids), length)) for ids in chosen])


class Case:
    """One (batch size, input length, output length) on a loaded model."""

    def __init__(self, worker: TpModelWorker, allocator: TokenToKVPoolAllocator, prompts: np.ndarray) -> None:
        self.worker = worker
        self.allocator = allocator
        self.prompts = prompts
        self.decode_latencies: list[float] = []
        self.decode_tokens: list[float] = []  # of each request, by step; the mean over the batch
        self.prefill_latency = 0.0

    def run(self, output_len: int, profile_prefix: str = "") -> None:
        """Prefill, and decode steps that give ``output_len - 1`` tokens per request on average, each timed in seconds.

        With speculation the steps end early where a request reaches the end of the context.
        """
        size, width = len(self.prompts), self.worker.decode_kind.rows_per_request
        if self.worker.speculator is None:
            batch = StaticBatch(self.worker.runner, self.allocator, size)
        else:
            batch = SpeculatingBatch(self.worker, self.allocator, size)
        room = self.worker.runner.model_config.context_len - width
        try:
            ids, self.prefill_latency = self._timed("prefill", profile_prefix, lambda: batch.extend(list(self.prompts)))
            while sum(self.decode_tokens) < output_len - 1 and max(batch.seq_lens) <= room:
                trace = profile_prefix if len(self.decode_tokens) == output_len // (2 * width) else ""
                before = sum(batch.seq_lens)
                ids, latency = self._timed("decode", trace, lambda ids=ids: batch.decode(ids))
                self.decode_latencies.append(latency)
                self.decode_tokens.append((sum(batch.seq_lens) - before) / size)
        finally:
            batch.release()

    def _timed(self, stage: str, profile_prefix: str, action: Any) -> tuple[torch.Tensor, float]:
        profiler = torch.profiler.profile() if profile_prefix else None
        if profiler is not None:
            profiler.start()
        (ids, _), latency = timed(action)
        if profiler is not None:
            profiler.stop()
            path = f"{profile_prefix}_batch{len(self.prompts)}_input{len(self.prompts[0])}_{stage}.trace.json"
            profiler.export_chrome_trace(path)
            print(f"trace of {stage}: {path}")
        return ids, latency

    def report(self, run_name: str, log_decode_step: int) -> dict[str, Any]:
        """Print the times and return the record."""
        size, length = len(self.prompts), len(self.prompts[0])
        record: dict[str, Any] = {
            "run_name": run_name,
            "batch_size": size,
            "input_len": length,
            "output_len": int(sum(self.decode_tokens)) + 1,
            "prefill_latency": self.prefill_latency,
            "prefill_throughput": size * length / self.prefill_latency,
        }
        print(
            f"Prefill. latency: {self.prefill_latency:6.5f} s, throughput: {record['prefill_throughput']:9.2f} token/s"
        )
        for step, (latency, tokens) in enumerate(zip(self.decode_latencies, self.decode_tokens, strict=True)):
            if step < DECODE_STEPS_PRINTED or (log_decode_step > 0 and step % log_decode_step == 0):
                print(
                    f"Decode {step}. Batch size: {size}, latency: {latency:6.5f} s, "
                    f"throughput: {size * tokens / latency:9.2f} token/s"
                )
        if self.decode_latencies:
            median = statistics.median(self.decode_latencies)
            accepted = sum(self.decode_tokens) / len(self.decode_tokens)
            throughput = size * accepted / median
            record["median_decode_latency"], record["median_decode_throughput"] = median, throughput
            print(f"Decode.  median latency: {median:6.5f} s, median throughput: {throughput:9.2f} token/s")
            if self.worker.speculator is not None:
                record["accept_length"] = accepted
                print(f"Decode.  accept length: {accepted:.2f}")
        total = self.prefill_latency + sum(self.decode_latencies)
        record["total_latency"] = total
        record["overall_throughput"] = (length + record["output_len"]) * size / total
        print(f"Total. latency: {total:6.3f} s, throughput: {record['overall_throughput']:9.2f} token/s")
        return record


def latency_test(args: argparse.Namespace, server_args: ServerArgs) -> list[dict[str, Any]]:
    """Run every case after a short warm-up of the first; cases that do not fit into the pools are named and skipped."""
    runner, allocator, resolved = load(server_args, args.batch_size)
    worker = TpModelWorker(runner, make_speculator(resolved, runner))
    vocab = runner.model_config.vocab_size
    records = []
    warm = False
    for size, length, output_len in itertools.product(args.batch_size, args.input_len, args.output_len):
        prompts = make_prompts(args, resolved.tokenizer_path or resolved.model_path, vocab, size, length)
        case_name = f"batch size {size}, input length {length}, output length {output_len}"
        context = runner.model_config.context_len
        if length + output_len > context:
            print(f"skipped: {case_name} is longer than the context of {context} tokens", file=sys.stderr)
            continue
        try:
            if not warm:
                print("Warmup ...")
                Case(worker, allocator, prompts).run(min(WARMUP_OUTPUT_LEN, output_len))
                warm = True
                print("Benchmark ...")
            case = Case(worker, allocator, prompts)
            case.run(output_len, args.profile_filename_prefix if args.profile else "")
        except BatchTooLargeError as error:
            print(f"skipped: {case_name}: {error}", file=sys.stderr)
            continue
        records.append(case.report(args.run_name, args.log_decode_step))
    if args.result_filename:
        with open(args.result_filename, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
    return records


def correctness_test(args: argparse.Namespace, server_args: ServerArgs) -> int:
    """Print greedy outputs, computed from prompts in one step and in two; returns 1 if their tokens differ."""
    if server_args.speculative_algorithm is not None:
        exit_with_errors(["--correctness-test decodes one token at a time: drop --speculative-algorithm"])
    runner, allocator, resolved = load(server_args, [len(CORRECTNESS_PROMPTS)])
    tokenizer = Tokenizer.from_path(resolved.tokenizer_path or resolved.model_path)
    lines = Path(args.prompt_filename).read_text(encoding="utf-8").splitlines() if args.prompt_filename else ()
    prompts = [tokenizer.encode(text) for text in ([line for line in lines if line] or CORRECTNESS_PROMPTS)]
    texts = []
    for cut in (0, args.cut_len):
        batch = StaticBatch(runner, allocator, len(prompts))
        if cut:
            batch.extend([ids[: min(cut, len(ids) - 1)] for ids in prompts])
        rest = [ids[length:] for ids, length in zip(prompts, batch.seq_lens, strict=True)]
        ids, output = batch.extend(rest)
        name = f"prefill in two steps (the first of {cut} tokens)" if cut else "prefill in one step"
        logits = output.next_token_logits.float()
        print(f"{name}: logits {tuple(logits.shape)}")
        for row in logits:
            head, tail = (" ".join(f"{value:8.4f}" for value in part.tolist()) for part in (row[:3], row[-3:]))
            print(f"  {head} ... {tail}   largest {row.max().item():8.4f} at {int(row.argmax())}")
        drawn = [ids.tolist()]
        for _ in range(args.output_len[0] - 1):
            ids, _ = batch.decode(ids)
            drawn.append(ids.tolist())
        batch.release()
        texts.append([list(column) for column in zip(*drawn, strict=True)])
    for prompt, whole, cut_ids in zip(prompts, *texts, strict=True):
        same = "same in two steps" if whole == cut_ids else f"DIFFERENT in two steps: {tokenizer.decode(cut_ids)!r}"
        print(f"{tokenizer.decode(prompt)!r} -> {tokenizer.decode(whole)!r} ({same})")
    return int(texts[0] != texts[1])


def run(args: argparse.Namespace) -> int:
    """Run as the command line ``args`` requests; returns the exit status."""
    try:
        server_args = ServerArgs.from_cli_args(args)
        configure_logging(server_args.log_level, "main")
        print(f"device: {current_platform.describe()}")
        if args.correctness_test:
            return correctness_test(args, server_args)
        return 0 if latency_test(args, server_args) else 1
    except ServerArgsError as error:
        exit_with_errors(error.errors)
    except (*USER_ERRORS, OSError) as error:
        exit_with_errors([str(error)])
    return 2

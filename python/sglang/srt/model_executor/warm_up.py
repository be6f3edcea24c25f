"""Prompt steps run before serving, so that no request waits for a kernel to be compiled."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from sglang.srt.distributed.parallel_state import get_parallel_state
from sglang.srt.layers.moe.ep_moe.factory import expert_recv_stats
from sglang.srt.model_executor.forward_batch_info import DECODE, ModelWorkerBatch, StepKind
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

# Requests per step: kernels differ for one request and for several.
BATCHES = (1, 3)
# Cached tokens before a step, and new tokens after a long prefix: these lengths decide how attention is split.
SHORT_PREFIXES = (0, 64)
LONG_PREFIXES = (1000, 8000)
TOKENS_AFTER_LONG = (1, 16, 77, 1024)
# Requests of two tokens each: the number of requests decides how the rows of a state are split over programs.
SHORT_REQUESTS = (2, 4, 8, 16)
# So many requests that their attention is not split, new and cached tokens of each.
MANY_REQUESTS = ((1, 1000),) * 512
# A one-token request mixed with longer ones: GDN layers split such a batch and read gathered rows.
MIXED = ((1, 64), (77, 0), (2, 64))

GREEDY, SAMPLED = {"temperature": 0.0}, {"temperature": 1.0}
FILTER, EDIT = {"top_p": 0.95}, {"frequency_penalty": 1.0}
# Sampling parameters, after greedy ones: kernels have all filters or none, and all edits of logits, masks too, or none.
SAMPLINGS: tuple[dict[str, float], ...] = (
    SAMPLED,
    SAMPLED | FILTER,
    GREEDY | EDIT,
    SAMPLED | EDIT,
    SAMPLED | FILTER | EDIT,
)

# One step: new and cached tokens of each request.
WarmUpStep = tuple[tuple[int, int], ...]
# Runs forward and sampling of a batch, and its drafts if a model drafts.
RunStep = Callable[[ModelWorkerBatch, SamplingBatchInfo], object]


def warm_up_steps(max_tokens: int, max_context: int) -> list[WarmUpStep]:
    """The steps to run: powers of two up to ``max_tokens``, that limit and an odd number of tokens, each after prefixes
    of several lengths; then many requests, and requests of unequal lengths."""
    counts = sorted({*powers_of_two(max_tokens), max_tokens, min(77, max_tokens)})
    wanted = [(prefix, counts) for prefix in SHORT_PREFIXES]
    wanted += [(prefix, [count for count in TOKENS_AFTER_LONG if count <= max_tokens]) for prefix in LONG_PREFIXES]
    steps = [
        ((tokens // batch, prefix),) * batch
        for prefix, sizes in wanted
        for batch in BATCHES
        for tokens in sizes
        if tokens >= batch
    ]
    steps += [*(((2, 0),) * batch for batch in SHORT_REQUESTS), MIXED, MANY_REQUESTS]
    return [step for step in steps if _fits(step, max_tokens, max_context)]


def _fits(step: WarmUpStep, max_tokens: int, max_context: int) -> bool:
    return sum(new for new, _ in step) <= max_tokens and all(new + cached <= max_context for new, cached in step)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … up to ``limit``."""
    return [1 << bit for bit in range(limit.bit_length())]


def warm_up(runner: ModelRunner, max_tokens: int, run: RunStep | None = None, kind: StepKind = DECODE) -> None:
    """Run prompt steps up to ``max_tokens`` tokens and decode steps of ``kind`` on the dummies; ``run`` runs one."""
    if current_platform.device_type == "cpu":  # nothing is compiled
        return
    began = time.perf_counter()
    steps = warm_up_steps(max_tokens, runner.model_config.context_len)
    with ExitStack() as paused:
        for recv_stats in expert_recv_stats(runner.model):
            paused.enter_context(recv_stats.paused())
        _run_steps(runner, steps, run, kind)
    if runner.relay is not None:
        for left in (runner.last_token, runner.relay.committed, runner.relay.drafts):
            left[runner.req_to_token_pool.padding_row] = 0
    current_platform.synchronize()
    logger.info("warmed up with %d prompt steps in %.1f s", len(steps), time.perf_counter() - began)


def _run_steps(
    runner: ModelRunner, steps: list[WarmUpStep], run: RunStep | None = None, kind: StepKind = DECODE
) -> None:
    graphs = runner.decode_graphs, runner.extend_graphs
    runner.decode_graphs = runner.extend_graphs = None
    try:
        for step in tqdm(steps, desc="Warming kernels up", unit="step", disable=None):
            run_step(runner, _extend_batch(runner, step, drafts=run is not None), run)
        for fields in SAMPLINGS:
            run_step(runner, _extend_batch(runner, ((1, 0),), drafts=run is not None), run, fields)
        for batch in sorted({*powers_of_two(runner.req_to_token_pool.size), runner.req_to_token_pool.size}):
            run_step(runner, _decode_batch(runner, batch, kind), run)
    finally:
        runner.decode_graphs, runner.extend_graphs = graphs


def run_step(
    runner: ModelRunner,
    batch: ModelWorkerBatch,
    run: RunStep | None = None,
    fields: Mapping[str, Any] = GREEDY,
) -> None:
    """Forward of ``batch``, whose rows all are in the dummy page, and sampling by ``fields``; or ``run``, if given."""
    rows = [SamplingRow(SamplingParams(**fields), 0, (), ()) for _ in range(batch.batch_size)]
    info = SamplingBatchInfo.from_rows(rows, runner.model_config.vocab_size, runner.device)
    if run is None:
        runner.sample(runner.forward(batch), info, batch)
    else:
        run(batch, info)


def _extend_batch(runner: ModelRunner, step: WarmUpStep, drafts: bool) -> ModelWorkerBatch:
    total = sum(new for new, _ in step)
    batch = ModelWorkerBatch.extend(
        _dummy_rows(runner, len(step)),
        [cached for _, cached in step],
        [cached + new for new, cached in step],
        torch.arange(total, dtype=torch.int64) % runner.model_config.vocab_size,
        torch.zeros(total, dtype=torch.int64),
        _dummy_states(runner, len(step)),
        successors=[-1] * len(step) if drafts else None,
    )
    return replace(batch, global_num_tokens=_all_groups(total), global_num_requests=_all_groups(len(step)))


def _decode_batch(runner: ModelRunner, size: int, kind: StepKind = DECODE) -> ModelWorkerBatch:
    rows, states, width = _dummy_rows(runner, size), _dummy_states(runner, size), kind.rows_per_request
    slots = torch.zeros(size * (width + kind.slots_ahead), dtype=torch.int64)
    batch = ModelWorkerBatch.uniform(kind, rows, [width] * size, slots, states)
    return replace(batch, global_num_tokens=_all_groups(size * width), global_num_requests=_all_groups(size))


def _dummy_rows(runner: ModelRunner, batch: int) -> list[int]:
    return [runner.req_to_token_pool.padding_row] * batch


def _dummy_states(runner: ModelRunner, batch: int) -> list[int] | None:
    return [0] * batch if runner.has_state else None


def _all_groups(num_tokens: int) -> list[int] | None:
    """``num_tokens`` for every attention group, which all run the same warm-up; None with one group."""
    groups = get_parallel_state().attn_dp_size
    return [num_tokens] * groups if groups > 1 else None

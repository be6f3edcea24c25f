"""The scheduler's own view of a request, and the host view of a step made from several of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sglang.srt.configs.cache_layout import STATE
from sglang.srt.constrained.llguidance_backend import GuidanceGrammar
from sglang.srt.managers.io_struct import FinishReason, TokenizedGenerateReqInput, TokenLogprobs
from sglang.srt.mem_cache.tree_node import TreeNode
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardMode, LogprobRequest, ModelWorkerBatch, StepKind
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo, SamplingRow


class Req:
    """One request, owned and changed by the scheduler alone.

    All lengths are in tokens:

    - ``seq_len``: prompt and output so far.
    - ``kv_committed_len``: the first tokens that have KV (and state) in the pools, or will have it when the launched
      steps have run.
    - ``kv_allocated_len``: the first tokens that have slots; slots past the committed tokens hold nothing of use.
    - ``cache_protected_len``: the first tokens whose slots the prefix cache owns and this request locks.
    - ``own_start``: tokens from here on were computed for this request and not found in the cache.
    - ``num_in_flight``: most tokens that launched steps may add and that the host does not know yet.
    """

    def __init__(self, message: TokenizedGenerateReqInput, seed: int, stop_ids: frozenset[int]) -> None:
        self.rid = message.rid
        self.origin_input_ids = message.input_ids
        self._prompt: np.ndarray = np.array(message.input_ids, dtype=np.int64)
        self.output_ids: list[int] = []
        self.sampling_params = message.sampling_params
        self.stream = message.stream
        self.seed = seed
        # Ids that end the request: the model's end-of-sequence ids unless ignored, and the request's own.
        self.stop_ids = stop_ids
        self.return_logprob = message.return_logprob
        self.logprob_start_len = message.logprob_start_len if message.return_logprob else -1
        self.top_logprobs_num = message.top_logprobs_num
        self.token_ids_logprob = tuple(message.token_ids_logprob)
        self.max_new_tokens = message.sampling_params.max_new_tokens or 0
        self.finish_reason: FinishReason | None = None
        # Output constraint: the text of the grammar, the token after which it begins, and its state.
        self.grammar_text = message.grammar
        self.grammar_after = message.grammar_after
        self.grammar: GuidanceGrammar | None = None
        self.grammar_error = ""
        self.arrived = time.perf_counter()
        self.first_token_at: float | None = None  # in the same clock
        # Memory, held from admission to release.
        self.req_pool_idx: int | None = None
        # What the request holds of each companion of the prefix cache, by unit.
        self.held: dict[str, Any] = {}
        self.last_node: TreeNode | None = None
        self.kv_committed_len = 0
        self.kv_allocated_len = 0
        self.cache_protected_len = 0
        self.own_start = 0
        self.num_in_flight = 0
        # Hybrid models: end a prefill chunk here, where the cache has KV but no snapshot of the recurrent state.
        self.state_boundary = 0
        # Reported to the client.
        self.cached_tokens = 0
        self.num_retractions = 0
        self.spec_verify_ct = 0  # verify steps, and draft tokens that became output
        self.spec_accepted = 0
        self.num_sent = 0
        self.input_logprobs: TokenLogprobs | None = None
        self.output_logprobs = TokenLogprobs()
        self._new_input_logprobs()

    def check(self, vocab_size: int) -> None:
        """Raise what would fail in a shared step: builds the tensors and applies the edits for this request."""
        ids = self._prompt
        if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
            raise ValueError(f"input_ids must lie in [0, {vocab_size}), got {ids.min()} to {ids.max()}")
        if any(not 0 <= token_id < vocab_size for token_id in self.token_ids_logprob) or self.top_logprobs_num < 0:
            raise ValueError(f"token_ids_logprob must lie in [0, {vocab_size}) and top_logprobs_num be at least 0")
        info = SamplingBatchInfo.from_rows([self.sampling_row()], vocab_size, torch.device("cpu"))
        if info.edits_logits():
            info.apply_edits(torch.zeros(1, vocab_size))

    def _new_input_logprobs(self) -> None:
        """Start the prompt's log-probabilities with the first requested token, which has none of its own."""
        if 0 <= self.logprob_start_len < len(self.origin_input_ids):
            first = self.origin_input_ids[self.logprob_start_len]
            self.input_logprobs = TokenLogprobs(logprobs=[None], ids=[first])
            if self.top_logprobs_num:
                self.input_logprobs.top.append(None)
            if self.token_ids_logprob:
                self.input_logprobs.chosen.append(None)

    def end_without_logprobs(self, reason: FinishReason) -> None:
        """End the request without log-probabilities, because these may be recorded in part."""
        self.finish_reason = reason
        self.return_logprob, self.input_logprobs = False, None

    @property
    def seq_len(self) -> int:
        return len(self.origin_input_ids) + len(self.output_ids)

    @property
    def token_ids(self) -> np.ndarray:
        """Prompt and output: [seq_len] int64, a new array."""
        return np.concatenate([self._prompt, np.array(self.output_ids, dtype=np.int64)])

    def token_after(self, end: int) -> int:
        """The token at position ``end``; -1 if it is not known yet."""
        if end < len(self.origin_input_ids):
            return self.origin_input_ids[end]
        return self.output_ids[end - len(self.origin_input_ids)] if end < self.seq_len else -1

    @property
    def new_tokens_left(self) -> int:
        return self.max_new_tokens - len(self.output_ids)

    @property
    def planned_len(self) -> int:
        """``seq_len`` after all steps in flight, at most."""
        return self.seq_len + self.num_in_flight

    @property
    def will_reach_limit(self) -> bool:
        """True when the tokens in flight may reach the request's limit, so that no further step is launched."""
        return self.max_new_tokens - len(self.output_ids) <= self.num_in_flight

    def ends_with(self, ids: Sequence[int]) -> bool:
        """Whether it has ended, or the next tokens ``ids`` reach its limit or contain a stop id; -1 is none."""
        first = len(self.output_ids) + 1
        stops = self.stop_ids.intersection(ids[max(0, self.sampling_params.min_new_tokens - first) :])
        return self.finish_reason is not None or bool(stops) or self.new_tokens_left <= len(ids)

    def is_due(self, num_before: int, interval: int) -> bool:
        """Whether to stream the tokens past the first ``num_before``: they are the first ones, or complete an
        interval."""
        if not self.stream:
            return False
        interval = self.sampling_params.stream_interval or interval
        return num_before == 0 or len(self.output_ids) // interval > num_before // interval

    def shares(self, other: Req, num_tokens: int) -> bool:
        """Whether both prompts begin with the same ``num_tokens`` tokens."""
        mine, its = self.origin_input_ids, other.origin_input_ids
        if min(len(mine), len(its)) < num_tokens or mine[num_tokens - 1] != its[num_tokens - 1]:
            return False
        return np.array_equal(self._prompt[:num_tokens], other._prompt[:num_tokens])

    def next_input_row(self) -> int | None:
        """The first prompt row whose log-probability is requested and not computed yet; None if there is none."""
        logprobs = self.input_logprobs
        if logprobs is None:
            return None
        row = self.logprob_start_len + len(logprobs.ids) - 1
        return row if row < len(self.origin_input_ids) - 1 else None

    def max_prefix_len(self) -> int:
        """The longest cached prefix that may be used, so that all rows whose logits are needed are computed."""
        row = self.next_input_row()
        return self.seq_len - 1 if row is None else min(self.seq_len - 1, row)

    def logprob_request(self, start: int, end: int) -> LogprobRequest | None:
        """What to compute in addition to the next token when rows ``start .. end`` run."""
        if not self.return_logprob:
            return None
        first = self.next_input_row()
        input_start: int | None = None
        targets: tuple[int, ...] = ()
        last = min(end, len(self.origin_input_ids) - 1)
        if first is not None and first < last:
            input_start = first - start
            targets = tuple(self.origin_input_ids[first + 1 : last + 1])
        return LogprobRequest(input_start, targets, self.top_logprobs_num, self.token_ids_logprob)

    def sampling_row(self) -> SamplingRow:
        return SamplingRow(
            self.sampling_params, self.seed, self.origin_input_ids, self.output_ids, sorted(self.stop_ids)
        )

    @property
    def edits_logits(self) -> bool:
        """Whether draft tokens are sampled from edited logits, which no graph does. Drafts have no constraint."""
        params = self.sampling_params
        return params.edits_logits or len(self.output_ids) < params.min_new_tokens


@dataclass
class ScheduleBatch:
    """The requests of one step, their tokens, and the slots of these tokens."""

    forward_mode: ForwardMode
    reqs: list[Req]
    starts: list[int]  # first token of this step, per request
    ends: list[int]  # one past the last
    max_new: list[int]  # most new tokens of each request: 0 where the step ends inside the prompt
    out_cache_loc: torch.Tensor  # [N] int64 on the host, requests one after the other
    kind: StepKind = DECODE  # kind of the decode steps
    num_prompts: int = 0  # the first requests, of which the step computes a prompt

    @property
    def prompts(self) -> list[Req]:
        return self.reqs[: self.num_prompts]

    @property
    def num_tokens(self) -> int:
        return sum(self.ends) - sum(self.starts)

    def ends_with(self, ids: Sequence[Sequence[int]]) -> bool:
        """Whether every request ends with its next tokens ``ids[i]``, or has an unfinished prompt and gets none."""
        each = zip(self.reqs, self.max_new, ids, strict=True)
        return all(not max_new or req.ends_with(new) for req, max_new, new in each)

    def to_worker_batch(self) -> ModelWorkerBatch:
        """The frozen host view; nothing below sees a request. The ids of a decode step stay on the device."""
        rows, states = _held([req.req_pool_idx for req in self.reqs]), None
        if STATE in self.reqs[0].held:
            states = [req.held[STATE] for req in self.reqs]
        spans = zip(self.reqs, self.starts, self.ends, strict=True)
        asked: list[LogprobRequest | None] = []
        if any(req.return_logprob for req in self.reqs):
            asked = [req.logprob_request(start, end) for req, start, end in spans]
        if self.forward_mode.is_decode():
            tells_drafts = self.kind.rows_per_request > 1 and any(req.grammar is not None for req in self.reqs)
            return ModelWorkerBatch.uniform(
                self.kind, rows, self.ends, self.out_cache_loc, states, asked, tells_drafts=tells_drafts
            )
        spans = zip(self.reqs, self.starts, self.ends, strict=True)
        ids = torch.from_numpy(np.concatenate([req.token_ids[start:end] for req, start, end in spans]))
        successors = None
        if self.kind != DECODE:
            successors = [req.token_after(end) for req, end in zip(self.reqs, self.ends, strict=True)]
        return ModelWorkerBatch.extend(
            rows, self.starts, self.ends, ids, self.out_cache_loc, states, self.forward_mode, asked,
            successors=successors,
        )  # fmt: skip


def _held(places: Sequence[int | None]) -> list[int]:
    """``places`` without None; every request of a batch must hold one."""
    held = [place for place in places if place is not None]
    assert len(held) == len(places)
    return held

"""The tokenizer manager's state of a request in flight, and the result dictionaries made from it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from sglang.srt.managers.io_struct import FinishReason, LogprobEntry, StrOutput, TokenLogprobs
from sglang.srt.managers.request_input import RequestError, SingleRequest
from sglang.srt.managers.request_metrics import RequestMetrics, RequestTimer
from sglang.srt.utils.logging_config import shown

logger = logging.getLogger(__name__)

TokenText = Callable[[int], str | None]

# Weights are those of start-up: nothing replaces them.
WEIGHT_VERSION = "default"


class LogprobLists:
    """Growing log-probability lists of one request's prompt or output, as the API shows them."""

    def __init__(self) -> None:
        self.tokens: list[LogprobEntry] = []
        self.top: list[list[LogprobEntry] | None] = []
        self.chosen: list[list[LogprobEntry] | None] = []

    def extend(self, new: TokenLogprobs, text_of: TokenText) -> None:
        self.tokens += [(lp, i, text_of(i)) for lp, i in zip(new.logprobs, new.ids, strict=True)]
        self.top += [_entries(row, text_of) for row in new.top]
        self.chosen += [_entries(row, text_of) for row in new.chosen]


def _entries(row: list[tuple[float, int]] | None, text_of: TokenText) -> list[LogprobEntry] | None:
    return None if row is None else [(logprob, token_id, text_of(token_id)) for logprob, token_id in row]


class RequestState:
    """One request in flight: what has arrived, and how much of it the reader has received."""

    def __init__(
        self,
        single: SingleRequest,
        rid: str,
        wire_rid: str,
        group: RequestGroup,
        text_of: TokenText,
        num_tokens: int,
        show_dp_rank: bool,
    ):
        self.rid = rid
        self.wire_rid = wire_rid
        self.index = len(group.states)
        # The DP rank that it was sent to, and the most tokens that it may hold there.
        self.dp_rank = 0
        self.num_tokens = num_tokens
        # No scheduler has started it yet.
        self.waits = True
        self.group = group
        self.created = time.perf_counter()
        self.timer: RequestTimer | None = None
        self.latency: float | None = None
        self.finish_reason: FinishReason | None = None
        self.text = ""
        self.output_ids: list[int] = []
        self.last: StrOutput | None = None
        self.input_logprobs = LogprobLists()
        self.output_logprobs = LogprobLists()
        self._single = single
        self._text_of = text_of
        self._show_dp_rank = show_dp_rank
        # Characters, ids and log-probabilities (of output and prompt) that the reader has received.
        self._read = 0, 0, 0, 0

    def sent_to(self, dp_rank: int, metrics: RequestMetrics | None) -> None:
        """Count its times, if that is wanted, for the scheduler that it is sent to."""
        self.dp_rank = dp_rank
        self.timer = None if metrics is None else RequestTimer(metrics, self.created)

    def started(self, at: float | None) -> None:
        """Record that a scheduler took it from its queue."""
        if self.timer is not None:
            self.timer.started(at)

    def receive(self, output: StrOutput) -> None:
        """Add one message; wakes the reader when it has something to read."""
        if self.timer is not None:
            self.timer.received(output)
        self.last = output
        self.text += output.text
        self.output_ids += output.output_ids
        if output.input_logprobs is not None:
            self.input_logprobs.extend(output.input_logprobs, self._text_of)
        if output.output_logprobs is not None:
            self.output_logprobs.extend(output.output_logprobs, self._text_of)
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.latency = time.perf_counter() - self.created
            if (error := self.error()) is not None and error.status_code < 500:  # others: where they happen
                logger.warning("request %.64r is ended: %s", self.rid, shown(error.message))
        self.group.on_output(self)

    def error(self) -> RequestError | None:
        """The error that ended the request, or None."""
        reason = self.finish_reason
        if reason is None or reason.type != "abort" or reason.status_code is None:
            return None
        err_type = reason.err_type or ("BadRequestError" if reason.status_code < 500 else "InternalServerError")
        return RequestError(reason.message or "The request was aborted.", reason.status_code, err_type)

    def result(self, incremental: bool) -> dict[str, Any]:
        """The API's result: all that has arrived, or only what arrived since the last call."""
        text, ids, output, prompt = self._read if incremental else (0, 0, 0, 0)
        self._read = (
            len(self.text),
            len(self.output_ids),
            len(self.output_logprobs.tokens),
            len(self.input_logprobs.tokens),
        )
        meta = self._meta_info(output, prompt)
        return {"text": self.text[text:], "output_ids": self.output_ids[ids:], "meta_info": meta}

    def _meta_info(self, logprob_start: int, prompt_start: int) -> dict[str, Any]:
        last = self.last
        assert last is not None
        meta: dict[str, Any] = {
            "id": self.rid,
            "finish_reason": None if self.finish_reason is None else msgspec.to_builtins(self.finish_reason),
            "prompt_tokens": last.prompt_tokens,
            "completion_tokens": last.completion_tokens,
            "cached_tokens": last.cached_tokens,
            "weight_version": WEIGHT_VERSION,
        }
        if last.spec_verify_ct:
            meta["spec_verify_ct"] = last.spec_verify_ct
            meta["spec_accept_token_num"] = last.spec_accepted
            meta["spec_accept_length"] = 1 + last.spec_accepted / last.spec_verify_ct
        if self._show_dp_rank:
            meta["dp_rank"] = self.dp_rank
        if self.group.warnings is not None:
            meta["warnings"] = self.group.warnings
        if self.latency is not None:
            meta["e2e_latency"] = self.latency
        if self._single.return_logprob:
            output, prompt = self.output_logprobs, self.input_logprobs
            meta["input_token_logprobs"] = prompt.tokens[prompt_start:]
            meta["output_token_logprobs"] = output.tokens[logprob_start:]
            if self._single.top_logprobs_num:
                meta["input_top_logprobs"] = prompt.top[prompt_start:]
                meta["output_top_logprobs"] = output.top[logprob_start:]
            if self._single.token_ids_logprob:
                meta["input_token_ids_logprobs"] = prompt.chosen[prompt_start:]
                meta["output_token_ids_logprobs"] = output.chosen[logprob_start:]
        return meta


class RequestGroup:
    """The requests that one reader waits for; a reader without a stream is woken once, at the end."""

    def __init__(self, stream: bool):
        self.stream = stream
        self.states: list[RequestState] = []
        self.error: RequestError | None = None
        # Shown in each result; None if the client did not ask for them.
        self.warnings: list[str] | None = None
        self._num_finished = 0
        self._changed: dict[int, RequestState] = {}
        self._event = asyncio.Event()

    def on_output(self, state: RequestState) -> None:
        if state.finish_reason is not None:
            self._num_finished += 1
            self.error = self.error or state.error()
        if self.stream:
            self._changed[state.index] = state
        if self.stream or self._num_finished == len(self.states) or self.error is not None:
            self._event.set()

    def fail(self, error: RequestError) -> None:
        self.error = self.error or error
        self._event.set()

    @property
    def is_finished(self) -> bool:
        """Whether no more output can arrive."""
        return self.error is not None or 0 < len(self.states) == self._num_finished

    @property
    def all_read(self) -> bool:
        """Whether every request is finished and ``wait`` has returned its last change."""
        return self._num_finished == len(self.states) and not self._changed and self.error is None

    async def wait(self) -> list[RequestState]:
        """The states that changed since the last call. Raises the error that ended any of them."""
        await self._event.wait()
        self._event.clear()
        if self.error is not None:
            raise self.error
        changed = list(self._changed.values())
        self._changed.clear()
        return changed

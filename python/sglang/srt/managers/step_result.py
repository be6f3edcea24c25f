"""Applies the results of a step to its requests: tokens, log-probabilities, and whether each request is finished."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from sglang.srt.layers.logits_processor import RowFault
from sglang.srt.layers.logprobs import HostLogprobs
from sglang.srt.managers.io_struct import FinishReason, TokenIDOutput, TokenizedGenerateReqInput, TokenLogprobs
from sglang.srt.managers.schedule_batch import Req

if TYPE_CHECKING:
    from sglang.srt.sampling.sampling_params import SamplingParams
    from sglang.srt.utils.hf_tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def record_input_logprobs(req: Req, blocks: Sequence[HostLogprobs]) -> bool:
    """Append the prompt log-probabilities that the request got from a step; whether none of them is NaN."""
    target = req.input_logprobs
    for block in blocks:
        assert target is not None
        first = req.logprob_start_len + len(target.ids)
        target.logprobs.extend(block.token)
        target.ids.extend(req.origin_input_ids[first : first + len(block.token)])
        if req.top_logprobs_num:
            target.top.extend(block.top)
        if req.token_ids_logprob:
            target.chosen.extend(block.chosen)
    return not any(math.isnan(value) for block in blocks for value in block.token)


def record_output_logprobs(req: Req, step: HostLogprobs, row: int, token_id: int) -> None:
    """Append the log-probability of the token that was sampled from ``row`` of the step."""
    target = req.output_logprobs
    target.logprobs.append(step.token[row])
    target.ids.append(token_id)
    if req.top_logprobs_num:
        target.top.append(step.top[row])
    if req.token_ids_logprob:
        target.chosen.append(step.chosen[row])


class StopChecker:
    """Decides after each token whether a request is finished; ``tokenizer`` decodes its end for stop strings."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def check(self, req: Req) -> FinishReason | None:
        """Why ``req`` ends with its newest token, or None; a completed grammar ends it too."""
        params = req.sampling_params
        grammar = req.grammar
        if grammar is not None:
            grammar.follow(req.output_ids)
            if grammar.error:
                return abort_reason(f"The output constraint cannot be followed: {grammar.error}.", 400, _BAD)
        length = len(req.output_ids)
        if length >= params.min_new_tokens:
            token = req.output_ids[-1]
            if token in req.stop_ids:
                return FinishReason(type="stop", matched=token)
            matched = self._matched_stop_string(req.output_ids, params) if params.stop else None
            if matched is not None:
                return FinishReason(type="stop", matched=matched)
        if grammar is not None and grammar.is_complete:
            return FinishReason(type="stop")
        if length >= req.max_new_tokens:
            return FinishReason(type="length", length=length)
        return None

    def _matched_stop_string(self, output_ids: Sequence[int], params: SamplingParams) -> str | None:
        """The stop string that the newest token completes in the raw text, or in the text that the client sees."""
        if self._tokenizer is None:
            return None
        # A visible token has at least one byte, so a window of as many tokens as the longest stop string has bytes,
        # doubled for invisible tokens, reaches back beyond the start of any match that the newest token completes.
        window = 2 * max(len(stop.encode()) for stop in params.stop) + 8
        tail = list(output_ids[-window:])
        matched = self._first_match(tail, params)
        hidden = self._tokenizer.all_special_ids
        if matched is None and params.skip_special_tokens and tail[-1] not in hidden and not hidden.isdisjoint(tail):
            shown = islice((i for i in reversed(output_ids) if i not in hidden), window)
            matched = self._first_match(list(shown)[::-1], params)
        return matched

    def _first_match(self, ids: list[int], params: SamplingParams) -> str | None:
        """The stop string that occurs first in the text of ``ids``, the longest of those that start there."""
        assert self._tokenizer is not None
        text = self._tokenizer.decode(ids, skip_special_tokens=False)
        earlier = ""
        if params.min_new_tokens > 1:
            # Stop strings that were completed before min_new_tokens are ordinary text.
            earlier = self._tokenizer.decode(ids[:-1], skip_special_tokens=False)
        found = [(text.find(stop, earlier.rfind(stop) + 1), -len(stop), stop) for stop in params.stop]
        return min((match for match in found if match[0] >= 0), default=(0, 0, None))[2]


def make_output(req: Req, is_first: bool) -> TokenIDOutput:
    """What is new of ``req`` since the last message about it."""
    params = req.sampling_params
    start = req.num_sent
    req.num_sent = len(req.output_ids)
    return TokenIDOutput(
        rid=req.rid,
        output_ids=req.output_ids[start:],
        finish_reason=req.finish_reason,
        prompt_tokens=len(req.origin_input_ids),
        completion_tokens=len(req.output_ids),
        cached_tokens=req.cached_tokens,
        skip_special_tokens=params.skip_special_tokens,
        no_stop_trim=params.no_stop_trim,
        stop=params.stop if is_first else [],
        input_logprobs=req.input_logprobs if is_first else None,
        output_logprobs=_tail(req.output_logprobs, start) if req.return_logprob else None,
        first_token_at=req.first_token_at if is_first else None,
        num_retractions=req.num_retractions,
        spec_verify_ct=req.spec_verify_ct,
        spec_accepted=req.spec_accepted,
    )


def refusal(message: TokenizedGenerateReqInput, reason: FinishReason) -> TokenIDOutput:
    """The only output of a message that never became a request."""
    return TokenIDOutput(
        rid=message.rid,
        output_ids=[],
        finish_reason=reason,
        prompt_tokens=len(message.input_ids),
        completion_tokens=0,
        cached_tokens=0,
    )


def _tail(logprobs: TokenLogprobs, start: int) -> TokenLogprobs:
    return TokenLogprobs(**{name: rows[start:] for name, rows in msgspec.structs.asdict(logprobs).items()})


_BAD = "BadRequestError"
_FAULTS = {
    RowFault.LOGITS: (
        "The model produced logits that are not numbers for this request; no token was sampled from them. Please "
        "report the prompt.",
        500,
    ),
    RowFault.EDITED: (
        "After this request's own penalties, logit_bias, forbidden stop ids (min_new_tokens), output constraint and "
        "temperature no logit is finite, so nothing can be sampled. Use a higher temperature, smaller penalties and "
        "biases, fewer stop_token_ids, or a constraint that the vocabulary can spell.",
        400,
    ),
    RowFault.TOKEN_ID: (
        "The sampling kernel returned a token id outside the vocabulary; the id was not used. Please report it with "
        'the "kernels" part of /server_info; SGLANG_KERNELS="sampling.greedy=torch" avoids the kernel.',
        500,
    ),
}


def fault_reason(req: Req, fault: RowFault) -> FinishReason:
    """The finish reason of a request for which no token could be sampled; logged if it is the server's fault."""
    message, status_code = _FAULTS[fault]
    if status_code >= 500:
        logger.error("request %.64r is ended: %s", req.rid, message)
    return abort_reason(message, status_code, _BAD if status_code == 400 else "InternalServerError")


def abort_reason(message: str, status_code: int | None = None, err_type: str | None = None) -> FinishReason:
    return FinishReason(type="abort", message=message, status_code=status_code, err_type=err_type)

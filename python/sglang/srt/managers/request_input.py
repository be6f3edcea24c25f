"""Normalises one native request body into single requests, and refuses what cannot be served."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.utils.limits import MAX_PROMPT_LOGPROBS, MAX_REQUESTS_PER_CALL, MAX_TOKEN_IDS_LOGPROB, MAX_TOP_LOGPROBS

T = TypeVar("T")


class RequestError(Exception):
    """A request that ends in an error: HTTP status and headers; message, type, field and code of the OpenAI body.

    ``code`` None means the status.
    """

    def __init__(
        self,
        message: str,
        status_code: int = 400,
        err_type: str = "BadRequestError",
        headers: dict[str, str] | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
    ):
        super().__init__(message)
        self.message = message
        self.status_code = status_code
        self.err_type = err_type
        self.headers = headers or {}
        self.param = param
        self.code = code


def too_long(message: str) -> RequestError:
    """400 for a prompt that does not fit into the context, by OpenAI's code."""
    return RequestError(message, param="input_ids", code="context_length_exceeded")


def longer_than_context(num_tokens: int, context_len: int) -> RequestError:
    return too_long(
        f"The input ({num_tokens} tokens) is longer than the model's context length ({context_len} tokens) without the "
        "one token that an output needs."
    )


def overloaded(message: str, retry_after_s: int) -> RequestError:
    """503 for a request that may be sent again after ``retry_after_s`` seconds."""
    return RequestError(message, 503, "ServiceUnavailableError", {"Retry-After": str(retry_after_s)})


class SingleRequest(msgspec.Struct, kw_only=True):
    """One prompt with its own options; exactly one of ``text`` and ``input_ids`` is set."""

    rid: str
    # Whether the client chose the id, so that it may come again.
    rid_given: bool
    text: str | None
    input_ids: list[int] | None
    sampling_params: dict[str, Any]
    return_logprob: bool
    logprob_start_len: int
    top_logprobs_num: int
    token_ids_logprob: list[int]


def split_request(obj: GenerateReqInput, max_requests: int | None = None) -> tuple[list[SingleRequest], bool]:
    """The single requests of ``obj`` in order, and whether its result is a list.

    Raises RequestError (400) for a missing prompt, for lists of unequal length, and for more than ``max_requests``
    prompts times samples.
    """
    prompts, is_batch = _prompts(obj)
    count = len(prompts)
    params: list[dict[str, Any]] = _per_request("sampling_params", obj.sampling_params, count, is_batch, {})
    if max_requests is not None:
        _check_num_requests(obj.sampling_params, params, max_requests)
    rids = _rids(obj.rid, count, is_batch)
    return_logprob = _per_request("return_logprob", obj.return_logprob, count, is_batch, False)
    start_len = _per_request("logprob_start_len", obj.logprob_start_len, count, is_batch, -1)
    top_num = _per_request("top_logprobs_num", obj.top_logprobs_num, count, is_batch, 0)
    chosen = _chosen_ids(obj.token_ids_logprob, count, is_batch)
    singles = [
        SingleRequest(
            rid=rids[i],
            rid_given=obj.rid is not None,
            text=prompt if isinstance(prompt, str) else None,
            input_ids=None if isinstance(prompt, str) else prompt,
            sampling_params=params[i],
            return_logprob=return_logprob[i],
            logprob_start_len=start_len[i],
            top_logprobs_num=top_num[i],
            token_ids_logprob=chosen[i],
        )
        for i, prompt in enumerate(prompts)
    ]
    return singles, is_batch


def _prompts(obj: GenerateReqInput) -> tuple[list[Any], bool]:
    if (obj.text is None) == (obj.input_ids is None):
        raise RequestError("Give exactly one of text and input_ids.")
    if obj.text is not None:
        if isinstance(obj.text, str):
            return [obj.text], False
        return _non_empty("text", obj.text), True
    ids = _non_empty("input_ids", obj.input_ids or [])
    nested = [isinstance(item, list) for item in ids]
    if all(nested):
        return ids, True
    if any(nested):
        raise RequestError("input_ids must be a list of token ids or a list of such lists, not a mixture.")
    return [ids], False


def _check_num_requests(given: Any, params: list[dict[str, Any]], limit: int) -> None:
    """Refuse a call with too many requests before anything is built from it."""
    total = sum(map(_num_samples, params)) if isinstance(given, list) else len(params) * _num_samples(given)
    if total > limit:
        raise RequestError(
            f"The call asks for {total} answers (prompts times n), but one call may have at most {limit}: more could "
            "never wait at the same time. Send several calls, or start the server with a larger "
            f"--max-queued-requests (up to {MAX_REQUESTS_PER_CALL})."
        )


def _num_samples(params: Any) -> int:
    """``n`` of raw sampling parameters, as ``SamplingParams`` reads it; a wrong value is refused later, by name."""
    n = params.get("n") if isinstance(params, Mapping) else None
    try:
        return max(1, msgspec.convert(n, int, strict=False))
    except msgspec.ValidationError:
        return 1


def _non_empty(name: str, value: list[T]) -> list[T]:
    if not value:
        raise RequestError(f"The prompt is empty: {name} is an empty list.", param="input_ids")
    return value


def _per_request(name: str, value: Any, count: int, is_batch: bool, default: T) -> list[T]:
    """One value per request: a scalar is shared, a list needs one entry per prompt."""
    if not isinstance(value, list):
        return [default if value is None else value] * count
    if not is_batch:
        raise RequestError(f"{name} is a list, but the request has only one prompt.")
    if len(value) != count:
        raise RequestError(f"{name} has {len(value)} entries for {count} prompts.")
    return [default if item is None else item for item in value]


def _rids(rid: str | list[str] | None, count: int, is_batch: bool) -> list[str]:
    if rid is None:
        return [uuid.uuid4().hex for _ in range(count)]
    if isinstance(rid, str):
        return [f"{rid}_{i}" for i in range(count)] if is_batch else [rid]
    rids: list[str] = _per_request("rid", rid, count, is_batch, "")
    if len(set(rids)) != count:
        raise RequestError("rid contains the same request id twice.")
    return rids


def _chosen_ids(value: list[Any] | None, count: int, is_batch: bool) -> list[list[int]]:
    if not value:
        return [[] for _ in range(count)]
    nested = [isinstance(item, list) for item in value]
    if any(nested) and not all(nested):
        raise RequestError("token_ids_logprob must be a list of token ids or a list of such lists, not a mixture.")
    if not nested[0]:
        return [_distinct(value)] * count
    per_request: list[list[int]] = _per_request("token_ids_logprob", value, count, is_batch, [])
    return [_distinct(ids) for ids in per_request]


def _distinct(ids: list[int]) -> list[int]:
    return list(dict.fromkeys(ids))


def check_logprobs(single: SingleRequest, vocab_size: int) -> None:
    """Raise RequestError for more log-probabilities per token than allowed, or for ids outside the vocabulary."""
    most = min(MAX_TOP_LOGPROBS, vocab_size)
    if not 0 <= single.top_logprobs_num <= most:
        raise RequestError(f"top_logprobs_num must be in [0, {most}], got {single.top_logprobs_num}.")
    if len(single.token_ids_logprob) > MAX_TOKEN_IDS_LOGPROB:
        raise RequestError(
            f"token_ids_logprob takes at most {MAX_TOKEN_IDS_LOGPROB} different ids, "
            f"got {len(single.token_ids_logprob)}."
        )
    for token_id in single.token_ids_logprob:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"token_ids_logprob must lie in [0, {vocab_size}), got {token_id}.")


def num_prompt_logprobs(single: SingleRequest, num_tokens: int) -> int:
    """The number of prompt log-probabilities that a request asks for. Raises RequestError for a start outside it."""
    start = single.logprob_start_len
    if start < -1 or start >= num_tokens:
        raise RequestError(
            f"logprob_start_len must be -1 (outputs only) or in [0, {num_tokens}), the prompt's length, got {start}."
        )
    if start < 0 or not single.return_logprob:
        return 0
    count = (num_tokens - start) * (1 + single.top_logprobs_num + len(single.token_ids_logprob))
    if count > MAX_PROMPT_LOGPROBS:
        raise too_many_logprobs("prompt", count, MAX_PROMPT_LOGPROBS)
    return count


def too_many_logprobs(what: str, asked: int, limit: int) -> RequestError:
    return RequestError(
        f"{asked} log-probabilities of prompt tokens are requested, but one {what} gives at most {limit}. Request "
        "fewer best tokens, start later in the prompt (logprob_start_len), or send several calls."
    )


def time_limit(asked: float | None, most: float | None) -> float | None:
    """Seconds after which a request ends, None for no limit. Raises RequestError for an invalid limit."""
    if asked is not None and not 0 < asked < math.inf:
        raise RequestError(f"request_timeout must be a number of seconds above 0, got {asked:g}.")
    return min((limit for limit in (asked, most) if limit is not None), default=None)


def out_of_time(limit_s: float | None) -> RequestError:
    """504 for a request that exceeded its time limit."""
    return RequestError(f"The request did not finish within {limit_s:g} s, its time limit.", 504, "TimeoutError")

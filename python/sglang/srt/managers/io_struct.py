"""Messages between the HTTP, scheduler and detokenizer processes, as msgpack structs with a tag each."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.limits import MAX_RID_CHARS

# One log-probability entry: (logprob or None, token id, token text or None).
LogprobEntry = tuple[float | None, int, str | None]


# A client's request id is part of every message about the request.
RequestId = Annotated[str, msgspec.Meta(max_length=MAX_RID_CHARS)]


class GenerateReqInput(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One native request before tokenization; lists mean a batch. ``return_warnings`` lists its unknown fields."""

    text: str | list[str] | None = None
    # msgspec allows one array type in a union: read both as int lists or lists of int lists.
    input_ids: list[int | list[int]] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: RequestId | list[RequestId] | None = None
    return_logprob: bool | list[bool] | None = None
    logprob_start_len: int | list[int] | None = None
    top_logprobs_num: int | list[int] | None = None
    token_ids_logprob: list[int | list[int]] | None = None
    return_text_in_logprobs: bool | None = None
    return_warnings: bool | None = None
    # Seconds; the server's --request-timeout bounds it.
    request_timeout: float | None = None
    # The prompt ends within a thought: the output constraint applies to what follows the thought.
    require_reasoning: bool | None = None
    stream: bool | None = None


class TokenizedGenerateReqInput(msgspec.Struct, kw_only=True, tag=True):
    """One request on its way to the scheduler.

    ``logprob_start_len`` is the first prompt position whose log-probability is wanted; -1 means outputs only.
    ``grammar`` constrains the output, after the token ``grammar_after`` if that is given; its source in the
    sampling parameters is no longer read.
    """

    rid: str
    input_ids: list[int]
    sampling_params: SamplingParams
    stream: bool = False
    return_logprob: bool = False
    logprob_start_len: int = -1
    top_logprobs_num: int = 0
    token_ids_logprob: list[int] = []
    grammar: str | None = None
    grammar_after: int | None = None


class GrammarReady(msgspec.Struct, kw_only=True, tag=True):
    """The scheduler's first rank to all ranks of its group: it has compiled the grammar of a request, or failed to."""

    rid: str


class AbortReq(msgspec.Struct, kw_only=True, tag=True):
    """End a request in any state: queued, partly computed or decoding.

    ``rid`` is the whole id, so that one client's disconnect never ends another's request whose id merely starts alike;
    ``abort_all`` ignores it.
    """

    rid: str = ""
    abort_all: bool = False


class StartedReqs(msgspec.Struct, kw_only=True, tag=True):
    """Requests that left a queue, retracted ones again; ``at``: seconds of the monotonic clock, None for now."""

    rids: list[str]
    at: float | None = None


class FlushCacheReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Drop the prefix cache; refused while requests are in flight."""

    seq: int


class FlushCacheReqOutput(msgspec.Struct, kw_only=True, tag=True):
    seq: int
    success: bool
    message: str = ""


class GetInternalStateReq(msgspec.Struct, kw_only=True, tag=True):
    """Ask the scheduler for its counters and pools and, unless ``brief``, its kernels and what it received of experts.

    The latter waits for the device, and what has arrived since the last question is then told.
    """

    seq: int
    brief: bool = False


class GetInternalStateReqOutput(msgspec.Struct, kw_only=True, tag=True):
    seq: int
    internal_state: dict[str, Any]


class ProfileReqInput(msgspec.Struct, kw_only=True, tag=True):
    """Start a profile, for ``num_steps`` or until it is stopped, or stop it; ``name`` begins the names of its files."""

    seq: int
    starts: bool
    name: str = ""
    num_steps: int | None = None
    activities: list[str] = []
    with_stack: bool = False
    record_shapes: bool = False


class ProfileReqOutput(msgspec.Struct, kw_only=True, tag=True):
    """``message`` is the file of rank 0, or why there is none."""

    seq: int
    success: bool
    message: str


class ShutdownReq(msgspec.Struct, kw_only=True, tag=True):
    """Stop a scheduler or detokenizer process after its current step."""


class WakeReq(msgspec.Struct, kw_only=True, tag=True):
    """Wakes the other attention groups: there is work again, and its steps need every group."""


class FinishReason(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why a request ended. ``type`` is "stop", "length" or "abort"."""

    type: str
    matched: int | str | None = None
    length: int | None = None
    message: str | None = None
    status_code: int | None = None
    err_type: str | None = None


class TokenLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities of consecutive tokens.

    ``logprobs[i]`` belongs to ``ids[i]`` (None for a token with no predecessor); ``top[i]`` are (logprob, id) pairs,
    best first; ``chosen[i]`` follows the ids that the request named. ``top`` and ``chosen`` are empty if not requested.
    """

    logprobs: list[float | None] = []
    ids: list[int] = []
    top: list[list[tuple[float, int]] | None] = []
    chosen: list[list[tuple[float, int]] | None] = []


class RequestOutput(msgspec.Struct, kw_only=True):
    """What is new of a request: ``output_ids``, a stop token included; ``input_logprobs`` once, with the first."""

    rid: str
    output_ids: list[int]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    input_logprobs: TokenLogprobs | None = None
    output_logprobs: TokenLogprobs | None = None
    # When the scheduler had the first token, with the first output; seconds of the machine's monotonic clock.
    first_token_at: float | None = None
    # Speculation: verify steps so far, and draft tokens that became output.
    spec_verify_ct: int = 0
    spec_accepted: int = 0


class TokenIDOutput(RequestOutput, kw_only=True):
    """From the scheduler, with what the detokenizer needs to produce text."""

    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    # Stop strings, with the first output: the detokenizer holds back text that may be the start of one.
    stop: list[str] = []
    num_retractions: int = 0


class BatchTokenIDOutput(msgspec.Struct, kw_only=True, tag=True):
    """Scheduler to detokenizer: the requests of one step that have new output."""

    outputs: list[TokenIDOutput]


class StrOutput(RequestOutput, kw_only=True):
    """New text of one request; ``text`` is the delta, never containing part of a stop string."""

    text: str


class BatchStrOutput(msgspec.Struct, kw_only=True, tag=True):
    """Detokenizer to tokenizer manager."""

    outputs: list[StrOutput]


SchedulerMessage = (
    TokenizedGenerateReqInput
    | GrammarReady
    | AbortReq
    | FlushCacheReqInput
    | GetInternalStateReq
    | ProfileReqInput
    | ShutdownReq
    | WakeReq
)
DetokenizerMessage = BatchTokenIDOutput | ShutdownReq
TokenizerMessage = BatchStrOutput | StartedReqs | FlushCacheReqOutput | GetInternalStateReqOutput | ProfileReqOutput

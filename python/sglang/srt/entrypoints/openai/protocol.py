"""Bodies of the OpenAI endpoints. Other keys are checked by ``request_fields``."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from sglang.srt.managers.io_struct import RequestId


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints share: OpenAI's fields, then upstream's extensions.

    ``return_warnings`` lists the unknown fields, which are ignored, in the response. ``request_timeout`` (seconds) ends
    an unfinished request with an error.
    """

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    n: int | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None

    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    rid: RequestId | None = None
    return_warnings: bool | None = None
    request_timeout: float | None = None
    # Output constraints: at most one of these; the last five are vLLM's fields.
    response_format: dict[str, Any] | None = None
    json_schema: str | dict[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """``/v1/completions``. All samples are returned: ``best_of`` may not differ from ``n``."""

    prompt: str | list[str | int | list[int]]
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """``/v1/chat/completions``. ``max_completion_tokens`` wins over ``max_tokens``; neither means the whole context.

    ``separate_reasoning`` False leaves the thought in the content; ``stream_reasoning`` False shows it at its end.
    """

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    input_ids: list[int] | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None
    reasoning_tokens: int = 0


class CompletionLogprobs(msgspec.Struct):
    """Four lists of one entry per token.

    ``text_offset`` is where the token begins, in characters from the start of the choice's text; a token that is part
    of a character begins where the character does. Rows of ``top_logprobs`` contain the sampled token in addition to
    the best.
    """

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float | None] | None] | None = None
    text_offset: list[int] = []


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None


class TopLogprob(msgspec.Struct):
    token: str
    bytes: list[int]
    logprob: float | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob] = []


class ChatLogprobs(msgspec.Struct):
    content: list[ChatLogprob]


class CalledFunction(msgspec.Struct):
    """``arguments`` is the text of a JSON object."""

    name: str
    arguments: str


class MessageToolCall(msgspec.Struct):
    id: str
    function: CalledFunction
    type: str = "function"


class DeltaToolCall(msgspec.Struct):
    """A whole call; ``index`` counts the calls of the message."""

    index: int
    id: str
    function: CalledFunction
    type: str = "function"


class ChatMessage(msgspec.Struct):
    role: str
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = None


class ChatChoice(msgspec.Struct):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None


class ChatDelta(msgspec.Struct, omit_defaults=True):
    role: str | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChatStreamChoice(msgspec.Struct):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    matched_stop: int | str | None = None


ChoiceT = TypeVar("ChoiceT")


class GenerationResponse(msgspec.Struct, Generic[ChoiceT]):
    """A whole response, or one chunk of a stream; ``object`` names which, and of which endpoint."""

    id: str
    object: str
    created: int
    model: str
    choices: list[ChoiceT]
    usage: Usage | None = None
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class ModelCard(msgspec.Struct):
    id: str
    root: str
    max_model_len: int
    created: int
    object: str = "model"
    owned_by: str = "sglang"
    parent: str | None = None


class ModelList(msgspec.Struct):
    data: list[ModelCard]
    object: str = "list"

"""Bodies of ``/v1/responses``, and the items and events of its answers."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Status = Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]


class TextOptions(msgspec.Struct, forbid_unknown_fields=True):
    """``format`` constrains the answer: text, json_object, or json_schema with name and schema."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """``/v1/responses``: nothing is stored, so that each request contains the whole conversation.

    The last seven fields are the server's own, as of ``/v1/chat/completions``.
    """

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    metadata: dict[str, Any] | None = None
    include: list[str] | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: str | None = None
    top_logprobs: int | None = None
    max_tool_calls: int | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None
    stream_options: dict[str, Any] | None = None
    user: str | None = None

    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    request_timeout: float | None = None
    return_warnings: bool | None = None


class TextPart(msgspec.Struct):
    """A part of a message, of type "output_text", or of a thought, of type "reasoning_text"."""

    text: str = ""
    type: str = "output_text"
    annotations: list[Any] | msgspec.UnsetType = msgspec.UNSET
    logprobs: list[Any] | msgspec.UnsetType = msgspec.UNSET


class MessageItem(msgspec.Struct, tag_field="type", tag="message"):
    id: str
    content: list[TextPart]
    status: Status = "in_progress"
    role: str = "assistant"


class ReasoningItem(msgspec.Struct, tag_field="type", tag="reasoning"):
    """What the model thought, in full."""

    id: str
    content: list[TextPart]
    status: Status = "in_progress"
    summary: list[Any] = []


class FunctionCallItem(msgspec.Struct, tag_field="type", tag="function_call"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status = "in_progress"


Item = MessageItem | ReasoningItem | FunctionCallItem


class InputTokensDetails(msgspec.Struct):
    cached_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens_details: OutputTokensDetails


class IncompleteDetails(msgspec.Struct):
    reason: str


class ResponseError(msgspec.Struct):
    code: str
    message: str


class ResponseObject(msgspec.Struct, kw_only=True):
    """A whole response; the settings of the request stand in it."""

    id: str
    created_at: int
    model: str
    status: Status = "in_progress"
    output: list[Item] = []
    usage: ResponseUsage | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, Any] = {}
    parallel_tool_calls: bool = True
    previous_response_id: str | None = None
    reasoning: ReasoningOptions = ReasoningOptions()
    store: bool = False
    temperature: float | None = None
    text: dict[str, Any] = {}
    tool_choice: str | dict[str, Any] = "auto"
    tools: list[Any] = []
    top_p: float | None = None
    truncation: str = "disabled"
    user: str | None = None
    background: bool = False
    object: str = "response"
    warnings: list[str] | msgspec.UnsetType = msgspec.UNSET


class ResponseEvent(msgspec.Struct, omit_defaults=True):
    """A streamed event. ``type`` names it and determines which of the other fields it has."""

    type: str
    sequence_number: int = -1
    response: ResponseObject | None = None
    output_index: int | None = None
    item_id: str | None = None
    content_index: int | None = None
    item: Item | None = None
    part: TextPart | None = None
    delta: str | None = None
    text: str | None = None
    logprobs: list[Any] | None = None
    name: str | None = None
    arguments: str | None = None

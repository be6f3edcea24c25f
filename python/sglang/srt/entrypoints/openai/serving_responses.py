"""``/v1/responses``: OpenAI's newer API, without state, on top of the chat endpoint."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.context import DEFAULT_MODEL_NAME, ServerContext
from sglang.srt.entrypoints.endpoint import Endpoint
from sglang.srt.entrypoints.errors import json_response
from sglang.srt.entrypoints.full_queue import place_of
from sglang.srt.entrypoints.http_io import EventStream, answer, asked_timeout, event, internal_error, read_body
from sglang.srt.entrypoints.openai.field_names import in_own_names
from sglang.srt.entrypoints.openai.protocol import ChatDelta
from sglang.srt.entrypoints.openai.reply_reader import ReplyReader
from sglang.srt.entrypoints.openai.responses_input import chat_body
from sglang.srt.entrypoints.openai.responses_protocol import (
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    Item,
    MessageItem,
    OutputTokensDetails,
    ReasoningItem,
    ReasoningOptions,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
    Status,
    TextPart,
)
from sglang.srt.entrypoints.openai.serving_base import Result
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.managers.request_input import RequestError

# Fields of the chat endpoint that have another name.
_RENAMED = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "max_output_tokens"),
    "response_format": "text.format",
    "reasoning_effort": "reasoning",
    "messages": "input",
}


class OpenAIServingResponses:
    """Answers with the turn that ``chat`` reads from the model's reply."""

    def __init__(self, context: ServerContext, chat: OpenAIServingChat):
        self._manager = context.manager
        self._chat = chat

    def endpoint(self) -> Endpoint:
        """Path and types."""
        return Endpoint(
            "/v1/responses", ("POST",), self.handle, "OpenAI", "The next turn of a conversation, as items.",
            ResponsesRequest, result=ResponseObject, chunk=ResponseEvent, is_queued=True,
        )  # fmt: skip

    async def handle(self, request: Request) -> Response:
        body, warnings = await read_body(request, ResponsesRequest, self._manager.unknown_fields)
        chat = chat_body(body)
        # By the id that the client sees, as with the other endpoints, it can abort the request.
        response_id = chat.rid = _new_id("resp")
        names = {native: _RENAMED.get(name, name) for native, name in self._chat.renamed(chat).items()} | _RENAMED
        own_names = partial(in_own_names, body.__struct_fields__, names)
        with own_names():
            native = await self._chat.native(chat, warnings)
            native.request_timeout = asked_timeout(request, body.request_timeout)
            turn = Turn(_begun(body, response_id), self._chat.parsers.reader(chat, native))
            if body.return_warnings:
                turn.response.warnings = warnings
            results = self._manager.generate_request(native, incremental=True, place=place_of(request))
            if body.stream:
                return EventStream(_events(turn, results, own_names), bytes)
            result = await answer(request, results)
        if isinstance(result, Response):
            return result
        for _ in turn.take(result):
            pass
        return json_response(turn.response)


def _begun(body: ResponsesRequest, response_id: str) -> ResponseObject:
    """The response before any output."""
    form = body.text.format if body.text is not None else None
    return ResponseObject(
        id=response_id,
        created_at=int(time.time()),
        model=body.model or DEFAULT_MODEL_NAME,
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {},
        parallel_tool_calls=body.parallel_tool_calls is not False,
        reasoning=body.reasoning or ReasoningOptions(),
        temperature=body.temperature,
        text={"format": form or {"type": "text"}},
        tool_choice=body.tool_choice or "auto",
        tools=body.tools or [],
        top_p=body.top_p,
        user=body.user,
    )


class Turn:
    """Extends ``response`` by the results of its request, with an event for each step."""

    def __init__(self, response: ResponseObject, reader: ReplyReader):
        self.response = response
        self._reader = reader
        self._open: MessageItem | ReasoningItem | None = None

    def take(self, result: Result) -> Iterator[ResponseEvent]:
        """What is new with ``result``."""
        meta = result["meta_info"]
        reason = meta["finish_reason"]
        deltas = self._reader.read(result["text"], result["output_ids"], is_last=reason is not None)
        for delta in deltas:
            yield from self._grow(delta)
        if reason is not None:
            yield from self._end(meta, reason["type"])

    def fail(self, error: RequestError) -> ResponseEvent:
        """The end of a stream that failed."""
        self.response.status = "failed"
        self.response.error = ResponseError(str(error.code or error.err_type), error.message)
        return ResponseEvent("response.failed", response=self.response)

    def _grow(self, delta: ChatDelta) -> Iterator[ResponseEvent]:
        if delta.reasoning_content:
            yield from self._say(ReasoningItem, "reasoning_text", delta.reasoning_content)
        if delta.content:
            yield from self._say(MessageItem, "output_text", delta.content)
        for call in delta.tool_calls or ():
            yield from self._close("completed")
            item = FunctionCallItem(_new_id("fc"), call.id, call.function.name, "")
            yield from self._add(item)
            place: dict[str, Any] = {"output_index": len(self.response.output) - 1, "item_id": item.id}
            item.arguments, item.status = call.function.arguments, "completed"
            yield ResponseEvent("response.function_call_arguments.delta", **place, delta=item.arguments)
            place |= {"name": item.name, "arguments": item.arguments}
            yield ResponseEvent("response.function_call_arguments.done", **place)
            yield ResponseEvent("response.output_item.done", output_index=place["output_index"], item=item)

    def _say(self, kind: type[MessageItem] | type[ReasoningItem], part_type: str, text: str) -> Iterator[ResponseEvent]:
        """More text of the item that is open, if it is of ``kind``, or of a new one."""
        if not isinstance(self._open, kind):
            yield from self._close("completed")
            is_message = kind is MessageItem
            item = kind(_new_id("msg" if is_message else "rs"), [])
            yield from self._add(item)
            self._open = item
            part = TextPart("", part_type, *([[], []] if is_message else []))
            yield ResponseEvent("response.content_part.added", **self._place(), part=part)
            item.content.append(part)
        assert self._open is not None
        self._open.content[0].text += text
        yield ResponseEvent(f"response.{part_type}.delta", **self._place(), delta=text, logprobs=_logprobs(part_type))

    def _add(self, item: Item) -> Iterator[ResponseEvent]:
        self.response.output.append(item)
        yield ResponseEvent("response.output_item.added", output_index=len(self.response.output) - 1, item=item)

    def _close(self, status: Status) -> Iterator[ResponseEvent]:
        """The end of the item that is open."""
        if self._open is None:
            return
        item, place, part = self._open, self._place(), self._open.content[0]
        item.status, self._open = status, None
        yield ResponseEvent(f"response.{part.type}.done", **place, text=part.text, logprobs=_logprobs(part.type))
        yield ResponseEvent("response.content_part.done", **place, part=part)
        yield ResponseEvent("response.output_item.done", output_index=place["output_index"], item=item)

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"output_index": len(self.response.output) - 1, "item_id": self._open.id, "content_index": 0}

    def _end(self, meta: dict[str, Any], reason: str) -> Iterator[ResponseEvent]:
        response = self.response
        ends: dict[str, Status] = {"length": "incomplete", "abort": "cancelled"}
        status = ends.get(reason, "completed")
        yield from self._close("completed" if status == "completed" else "incomplete")
        response.status = status
        if status == "incomplete":
            response.incomplete_details = IncompleteDetails("max_output_tokens")
        prompt, completion = meta["prompt_tokens"], meta["completion_tokens"]
        response.usage = ResponseUsage(
            prompt,
            completion,
            prompt + completion,
            InputTokensDetails(meta["cached_tokens"]),
            OutputTokensDetails(self._reader.reasoning_tokens),
        )
        yield ResponseEvent(f"response.{'completed' if status == 'completed' else 'incomplete'}", response=response)


async def _events(
    turn: Turn, results: AsyncGenerator[Any, None], own_names: Callable[[], AbstractContextManager[None]]
) -> AsyncGenerator[bytes, None]:
    """Server-sent events, numbered. An error after the first of them is the last."""
    number = -1

    def numbered(events: Sequence[ResponseEvent] | Iterator[ResponseEvent]) -> Iterator[bytes]:
        nonlocal number
        for content in events:
            number += 1
            content.sequence_number = number
            yield f"event: {content.type}\n".encode() + event(content)

    async with aclosing(results):
        try:
            with own_names():
                async for result in results:
                    if number < 0:
                        begins = ("response.created", "response.in_progress")
                        for data in numbered([ResponseEvent(name, response=turn.response) for name in begins]):
                            yield data
                    for data in numbered(turn.take(result)):
                        yield data
        except Exception as error:
            if number < 0:
                raise
            failure = error if isinstance(error, RequestError) else internal_error(error)
            for data in numbered([turn.fail(failure)]):
                yield data


def _logprobs(part_type: str) -> list[Any] | None:
    """Of a message none are given, and of a thought there is no such field."""
    return [] if part_type == "output_text" else None


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"

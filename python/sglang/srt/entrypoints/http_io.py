"""Reads request bodies and writes responses, and cancels the work when the client disconnects."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sglang.srt.entrypoints.body import decode_body
from sglang.srt.entrypoints.errors import body_error, error_body, error_response
from sglang.srt.managers.request_fields import UnknownFields
from sglang.srt.managers.request_input import RequestError

logger = logging.getLogger(__name__)

T = TypeVar("T")
# In the scope's extensions, what writes one chunk of a body without a message, or says that it did not.
WRITE_CHUNK = "sglang.write_chunk"
DONE_EVENT = b"data: [DONE]\n\n"
# nginx's status for a client that closed its request; it appears only in the access log.
CLIENT_CLOSED_REQUEST = 499
TIMEOUT_HEADER = "x-request-timeout"
_MAX_OTHER_COMMAS = 64


def event(content: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


async def read_body(
    request: Request,
    body_type: type[T],
    unknown_fields: UnknownFields,
    max_items: int | None = None,
    max_lists: int | None = None,
) -> tuple[T, list[str]]:
    """The JSON body as ``body_type``, and the warnings of ``decode_body``; ``max_items`` bounds its lists together,
    and ``max_lists`` how many there are in one.

    Raises RequestError.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.split(";")[0].strip().lower() != "application/json":
        raise body_error(
            f"Unsupported media type {content_type!r}: send the body as JSON with Content-Type: application/json."
        )
    if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) != "identity":
        raise body_error(f"Content-Encoding {encoding!r:.40} is not supported: send the body uncompressed.")
    data = bytearray()
    try:
        async for chunk in request.stream():
            data += chunk
    except ClientDisconnect:
        raise RequestError("The client disconnected while sending the body.", CLIENT_CLOSED_REQUEST) from None
    # Each item of a list but its first follows a comma: what is refused is not decoded.
    if max_items is not None and len(data) > max_items and data.count(b",") > max_items + _MAX_OTHER_COMMAS:
        raise body_error(f"The lists of the body hold more than {max_items} items, the most that one call may send.")
    if max_lists is not None and data.count(b"[") > 1 + max_lists:
        raise body_error(f"The body holds more than {max_lists} lists in one, the most that one call may send.")
    return decode_body(data, body_type, unknown_fields)


def asked_timeout(request: Request, in_body: float | None) -> float | None:
    """The request's own time limit in seconds: the smaller of header and body field; None without both."""
    text = request.headers.get(TIMEOUT_HEADER)
    if text is None:
        return in_body
    try:
        seconds = float(text)
    except ValueError:
        raise RequestError(f"The header {TIMEOUT_HEADER} must be a number of seconds, got {text[:40]!a}.") from None
    return seconds if in_body is None else min(seconds, in_body)


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_while_connected(receive: Receive, work: Awaitable[T]) -> tuple[bool, T | None]:
    """Run ``work``, and cancel it if the client disconnects. Returns (done, its result)."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return False, None
        return True, task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def answer(request: Request, results: AsyncGenerator[Any, None]) -> Any:
    """The only item of ``results``, or the Response to send instead of it."""

    async def first() -> Any:
        async with aclosing(results):
            return await anext(results)

    done, result = await run_while_connected(request.receive, first())
    return result if done else Response(status_code=CLIENT_CLOSED_REQUEST)


class EventStream(Response):
    """Server-sent events of ``contents``, by ``encode``, with ``[DONE]`` at the end.

    The headers wait for the first event, so that a request that fails at once still gets a proper status. A later
    error becomes an event. When the client leaves, ``contents`` is closed. A connection that offers ``WRITE_CHUNK`` is
    given each chunk at once, past all that looks at messages; where it takes none, as before the headers and from a
    client that reads too slowly, there is a message, which waits.
    """

    def __init__(self, contents: AsyncGenerator[Any, None], encode: Callable[[Any], bytes] = event):
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._contents = contents
        self._encode = encode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_while_connected(receive, self._pump(scope, receive, send))

    async def _pump(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False
        write_at_once: Callable[[bytes], bool] | None = scope.get("extensions", {}).get(WRITE_CHUNK)

        async def write(chunk: bytes) -> None:
            nonlocal started
            if not started:
                started = True
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": chunk, "more_body": True})

        try:
            async with aclosing(self._contents) as contents:
                async for content in contents:
                    chunk = self._encode(content)
                    if write_at_once is None or not write_at_once(chunk):
                        await write(chunk)
        except Exception as error:
            failure = error if isinstance(error, RequestError) else internal_error(error)
            if not started:
                await error_response(failure)(scope, receive, send)
                return
            await write(event(error_body(failure)))
        await write(DONE_EVENT)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def internal_error(error: Exception) -> RequestError:
    """Log an unexpected exception and return a 500 that states only its type."""
    logger.error("A request failed inside the server.", exc_info=error)
    return RequestError(f"Internal server error: {type(error).__name__}.", 500, "InternalServerError")

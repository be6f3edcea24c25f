"""Limits on the bytes of request bodies: of one request, and of all unfinished ones together."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang.srt.entrypoints.errors import error_response
from sglang.srt.managers.request_input import RequestError, overloaded
from sglang.srt.utils.limits import MAX_BODY_BYTES_IN_FLIGHT

_RETRY_AFTER_S = 1


class BodyLimit:
    """ASGI middleware. Refuses by Content-Length before anything is read, or else as soon as the sum is too large."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self._app = app
        self._max_bytes = max_bytes
        self._max_in_flight = max(MAX_BODY_BYTES_IN_FLIGHT, 2 * max_bytes)
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared[:19]) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        received = 0

        async def count() -> Message:
            nonlocal received
            message = await receive()
            size = len(message.get("body", b""))
            received += size
            self._in_flight += size
            if received > self._max_bytes:
                raise self._too_large()
            if self._in_flight > self._max_in_flight:
                raise overloaded(
                    f"The bodies of unfinished requests hold more than {self._max_in_flight} bytes.", _RETRY_AFTER_S
                )
            return message

        try:
            await self._app(scope, count, send)
        finally:
            self._in_flight -= received

    def _too_large(self) -> RequestError:
        message = f"The body is larger than {self._max_bytes} bytes, which --max-request-bytes allows."
        # What the client is still sending is not read, so the connection cannot be used again.
        return RequestError(message, 413, "RequestTooLargeError", {"Connection": "close"})

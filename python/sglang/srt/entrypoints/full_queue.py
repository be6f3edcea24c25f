"""Refuses requests to a full queue before their bodies are read, and reserves places for those that are being read."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang.srt.entrypoints.endpoint import Endpoint
from sglang.srt.entrypoints.errors import error_response
from sglang.srt.managers.admission import Place
from sglang.srt.managers.request_input import RequestError
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.utils.limits import MAX_DRAINED_BODY_BYTES

logger = logging.getLogger(__name__)

_PLACE = "sglang.place"
_LOG_INTERVAL_S = 5.0


def place_of(request: Request) -> Place | None:
    """The place that is reserved for a request whose body has been read."""
    place: Place | None = request.scope.get(_PLACE)
    return place


class FullQueue:
    """ASGI middleware over the endpoints whose requests wait in the queue.

    A body that is still being received has no place, or slow clients would take all. With its last byte the request
    gets one, until its handler knows how many it needs, so that simultaneous requests do not all use the same free
    places.
    """

    def __init__(self, app: ASGIApp, manager: TokenizerManager, endpoints: Iterable[Endpoint]):
        self._app = app
        self._manager = manager
        self._logged = 0.0
        self._num_logged = 0
        self._methods = {path: item.methods for item in endpoints if item.is_queued for path in item.paths}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in self._methods.get(scope["path"], ()):
            await self._app(scope, receive, send)
            return
        try:
            self._manager.check_room()
        except RequestError as error:
            self._log(error)
            if not _is_short(scope):
                error.headers["Connection"] = "close"
            await error_response(error)(scope, receive, send)
            return
        place: Place | None = None

        async def receive_and_take_place() -> Message:
            nonlocal place
            message = await receive()
            if place is None and message["type"] == "http.request" and not message.get("more_body", False):
                self._manager.check_room()
                place = scope[_PLACE] = Place(self._manager.admission)
            return message

        try:
            await self._app(scope, receive_and_take_place, send)
        finally:
            if place is not None:
                place.leave()

    def _log(self, error: RequestError) -> None:
        now = time.monotonic()
        if now - self._logged < _LOG_INTERVAL_S:
            return
        num_refused = self._manager.admission.num_refused
        logger.warning(
            "%s Refused since the last line of this kind: %d.", error.message, num_refused - self._num_logged
        )
        self._logged, self._num_logged = now, num_refused


def _is_short(scope: Scope) -> bool:
    """Whether the body is read to its end, so that the connection can be used again; else it is closed."""
    length = b"0"
    for name, value in scope["headers"]:
        if name in (b"transfer-encoding", b"expect"):
            return False
        if name == b"content-length":
            length = value
    return length.isdigit() and int(length[:19]) <= MAX_DRAINED_BODY_BYTES

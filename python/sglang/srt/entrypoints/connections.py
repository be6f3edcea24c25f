"""One client connection: uvicorn's HTTP/1.1 protocol with limits on what a client may hold open, and for how long."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
from typing import Any

import h11
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sglang.srt.entrypoints.errors import error_response
from sglang.srt.entrypoints.http_io import WRITE_CHUNK
from sglang.srt.managers.request_input import overloaded
from sglang.srt.utils.limits import (
    BODY_TIMEOUT_S,
    HALF_CLOSED_S,
    HEADER_TIMEOUT_S,
    LINGER_S,
    MAX_REFUSED_CONNECTIONS,
    MIN_BODY_BYTES_PER_S,
    SPARE_DESCRIPTORS,
    WRITE_TIMEOUT_S,
)

logger = logging.getLogger(__name__)


def fit_connections(wanted: int) -> int:
    """Raise the limit of open descriptors for ``wanted`` connections; returns how many are possible."""
    used = len(os.listdir("/dev/fd")) + MAX_REFUSED_CONNECTIONS + SPARE_DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(soft, used + wanted if hard == resource.RLIM_INFINITY else min(hard, used + wanted))
    if most > soft != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft == resource.RLIM_INFINITY or soft >= used + wanted:
        return wanted
    room = max(1, soft - used)
    logger.warning(
        "--max-connections %d needs %d file descriptors, and this process may open %d: at most %d connections are "
        "served at once. Raise it with ulimit -n.", wanted, used + wanted, soft, room,
    )  # fmt: skip
    return room


class Connection(H11Protocol):
    """Closes when the client is too slow, in a way that lets it read the reply while it is still sending a body.

    ``check_time`` must be called about once per second. Headers have ``HEADER_TIMEOUT_S``; a body has
    ``BODY_TIMEOUT_S`` and what its size takes at ``MIN_BODY_BYTES_PER_S``; output that is not read for
    ``WRITE_TIMEOUT_S`` ends the connection. Time in which the server itself is slow does not count.
    """

    def __init__(self, *args: Any, max_connections: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._max_connections = max_connections
        self._served, self.app = self.app, self._serve
        self._lingers = False
        # Since when a head or a body is incomplete, and output unread; loop time, None if it is not.
        self._head_since: float | None = None
        self._body_since: float | None = None
        self._unread_since: float | None = None
        self._body_bytes = 0
        self._unread_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self._head_since = self.loop.time()
        over = len(self.connections) - self._max_connections
        if over > MAX_REFUSED_CONNECTIONS:
            transport.abort()
        elif over > 0:
            self.app = self._refuse

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application, which may write chunks past h11 where bodies without a length are sent in chunks."""
        if scope["http_version"] == "1.1":
            scope["extensions"] = {WRITE_CHUNK: self._write_chunk}
        try:
            await self._served(scope, receive, send)
        finally:
            scope.pop("extensions", None)  # they hold this connection, which holds the scope

    def _write_chunk(self, chunk: bytes) -> bool:
        """Frame and write one chunk of a body as h11 would; False, and nothing done, where there is more to it: the
        client is gone or reads too slowly, or a body is not what comes next."""
        if self.cycle.disconnected or self.flow.write_paused or self.conn.our_state is not h11.SEND_BODY or not chunk:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
        return True

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = overloaded(f"{self._max_connections} connections are open, which --max-connections allows.", 1)
        error.headers["Connection"] = "close"
        await error_response(error)(scope, receive, send)

    def data_received(self, data: bytes) -> None:
        if self._lingers:
            return
        super().data_received(data)
        their_state = self.conn.their_state
        if their_state is not h11.IDLE:
            self._head_since = None
        elif self._head_since is None:
            self._head_since = self.loop.time()
        if their_state is not h11.SEND_BODY:
            self._body_since = None
        elif self._body_since is None:
            self._body_since, self._body_bytes = self.loop.time(), 0
        self._body_bytes += len(data)

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio takes True for "stay open"
        """Give a client that has closed its sending side a moment to receive a reply; it may have left."""
        answers = self.cycle is not None and not self.cycle.response_complete
        if not answers or self._lingers or self.conn.their_state not in (h11.DONE, h11.MUST_CLOSE):
            return False
        self.cycle.keep_alive = False
        self.loop.call_later(HALF_CLOSED_S, self.transport.close)
        return True

    def check_time(self) -> None:
        """End the connection if its client has been too slow."""
        now = self.loop.time()
        if self.flow.read_paused and self._body_since is not None:
            self._body_since, self._body_bytes = now, 0
        late_head = self._head_since is not None and now - self._head_since > HEADER_TIMEOUT_S
        body_limit_s = BODY_TIMEOUT_S + self._body_bytes / MIN_BODY_BYTES_PER_S
        late_body = self._body_since is not None and now - self._body_since > body_limit_s
        if late_head or late_body or self._is_unread(now):
            self.transport.abort()

    def _is_unread(self, now: float) -> bool:
        size, before = self.transport.get_write_buffer_size(), self._unread_bytes
        self._unread_bytes = size
        # While the buffer grows, it is not known what the client reads; it grows at most to its high-water mark.
        moves = size < before or size > before and not self.flow.write_paused
        if not size or moves or self._unread_since is None:
            self._unread_since = now if size else None
            return False
        return now - self._unread_since > WRITE_TIMEOUT_S

    @property
    def is_closing(self) -> bool:
        return self._lingers

    def close(self, transport: asyncio.Transport) -> None:
        """Close now; while the client still sends, first shut down the sending side and discard the rest.

        A socket that is closed with unread data resets the connection, and the answer may be lost with it.
        """
        if self._lingers or self.conn.their_state not in (h11.SEND_BODY, h11.ERROR) or not transport.can_write_eof():
            transport.close()
            return
        self._lingers = True
        transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, transport.abort)


class _Transport:
    """A transport whose ``close`` its connection decides on, and that sends a head together with what follows it."""

    def __init__(self, transport: asyncio.Transport, connection: Connection):
        self._transport = transport
        self._connection = connection
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if data.startswith(b"HTTP/1.1 "):
            # Usually the body follows at once; in any case it is sent within this turn of the loop.
            self._send_head()
            self._head = data
            self._connection.loop.call_soon(self._send_head)
        elif self._head:
            data, self._head = self._head + data, b""
            self._transport.write(data)
        else:
            self._transport.write(data)

    def _send_head(self) -> None:
        if self._head:
            self._transport.write(self._head)
            self._head = b""

    def is_closing(self) -> bool:
        return self._connection.is_closing or self._transport.is_closing()

    def close(self) -> None:
        self._send_head()
        self._connection.close(self._transport)

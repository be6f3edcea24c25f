"""One client connection: uvicorn's HTTP/1.1 protocol with bounds on what a client may hold open."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from sglang.srt.utils.limits import LINGER_S


class Connection(H11Protocol):
    """Ends in a way that lets the client read the answer to a request of which it is still sending the body."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._lingers = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        if not self._lingers:
            super().data_received(data)

    @property
    def is_closing(self) -> bool:
        return self._lingers

    def close(self, transport: asyncio.Transport) -> None:
        """Close now, or, while the client sends what nobody will read, send the end first and drop the rest.

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
    """A transport whose ``close`` its connection decides on."""

    def __init__(self, transport: asyncio.Transport, connection: Connection):
        self._transport = transport
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.is_closing or self._transport.is_closing()

    def close(self) -> None:
        self._connection.close(self._transport)

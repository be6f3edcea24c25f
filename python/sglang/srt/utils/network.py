"""The socket that the HTTP server listens on."""

from __future__ import annotations

import socket

_BACKLOG = 2048


class PortError(ValueError):
    """The address cannot be listened on."""


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening. Raises PortError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _port_error(host, port, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _port_error(host, port, error) from None
    return listener


def listen(listener: socket.socket) -> None:
    """Start to listen. Raises PortError when another process did so on the same address since it was bound."""
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _port_error(host, port, error) from None


def _port_error(host: str, port: int, error: OSError) -> PortError:
    return PortError(
        f"Cannot listen on {host} port {port}: {error.strerror or error}. Is another server running there? "
        "Stop it, or choose another --port."
    )

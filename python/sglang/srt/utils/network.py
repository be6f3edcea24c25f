"""The address and the socket that the HTTP server listens on."""

from __future__ import annotations

import errno
import re
import socket

LOOPBACK_HOSTS = ("localhost", "::1")
_BACKLOG = 2048
_KEEP_ALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4))


class PortError(ValueError):
    """The address cannot be listened on."""


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches."""
    return host in LOOPBACK_HOSTS or re.fullmatch(r"127\.\d+\.\d+\.\d+", host) is not None


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to the address, not yet listening. Raises PortError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _port_error(host, port, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _keep_alive(listener)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _port_error(host, port, error) from None
    return listener


def _keep_alive(listener: socket.socket) -> None:
    """Let the kernel find out that a silent client's machine is gone; connections inherit it."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEP_ALIVE:
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def listen(listener: socket.socket) -> None:
    """Start to listen. Raises PortError when another process did so on the same address since it was bound."""
    try:
        listener.listen(_BACKLOG)
    except OSError as error:
        host, port = listener.getsockname()[:2]
        raise _port_error(host, port, error) from None


def _port_error(host: str, port: int, error: OSError) -> PortError:
    advice = "Is another server running there? Stop it, or choose another --port."
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        advice = "--host must be a name or an address of this machine, such as 127.0.0.1; 0.0.0.0 means all."
    return PortError(f"Cannot listen on {host} port {port}: {error.strerror or error}. {advice}")

"""Host names that the server accepts, and web pages that may call it from a browser."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit

from starlette.responses import Response

from sglang.srt.entrypoints.errors import error_response
from sglang.srt.managers.request_input import RequestError
from sglang.srt.utils.network import is_loopback

# Probes call by address, from monitoring, and their answers contain nothing that needs a host name check.
_PROBE_PATHS = frozenset({"/health", "/health_generate", "/ping", "/ready"})
# Paths that change state whatever the method.
_CHANGING_PATHS = frozenset({"/flush_cache"})
_READING_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
_MAX_SHOWN = 100


def split_list(text: str | None) -> list[str]:
    """The items of a list that is separated by commas."""
    return [item.strip() for item in (text or "").split(",") if item.strip()]


class SitePolicy:
    """Keeps web pages from reaching a server that trusts everyone who can connect to it.

    A page can use its own domain for a loopback address (DNS rebinding): a server on a loopback address without a
    key answers loopback names only. A page can also send requests whose answers it does not get to read: what changes
    state is refused to pages of other origins, as browsers name them, unless ``allowed_origins`` holds them.
    """

    def __init__(self, host: str, has_key: bool, allowed_hosts: str | None, allowed_origins: str | None):
        names = split_list(allowed_hosts)
        self._any_host = "*" in names or not names and (has_key or not is_loopback(host))
        self._hosts = {_host_name(name) for name in names}
        self._origins = {origin.rstrip("/").lower() for origin in split_list(allowed_origins)}

    def refusal(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> Response | None:
        """None if the request may pass, else a 403 that names the flag that would allow it."""
        path = "/" + path.strip("/")
        host = headers.get(b"host", b"").decode("latin-1")
        if path not in _PROBE_PATHS and not self._answers(host):
            shown = ascii(host[:_MAX_SHOWN])
            return _forbidden(
                f"The server does not answer under the name {shown}. Use localhost, or start it with "
                "--allowed-hosts and that name."
            )
        if method in _READING_METHODS and path not in _CHANGING_PATHS:
            return None
        origin = headers.get(b"origin", b"").decode("latin-1")
        site = headers.get(b"sec-fetch-site", b"").decode("latin-1").lower()
        if origin:
            is_own = origin.lower().partition("://")[2] == host.lower()
        else:
            is_own = site in ("", "none", "same-origin")
        if is_own or "*" in self._origins or origin.lower() in self._origins:
            return None
        return _forbidden(
            f"{path[:_MAX_SHOWN]} is refused to a web page of another origin ({ascii(origin[:_MAX_SHOWN] or site)}). "
            "Start the server with --allowed-origins and that origin to let it."
        )

    def _answers(self, host: str) -> bool:
        # Browsers always name a host.
        name = _host_name(host)
        return self._any_host or not host or is_loopback(name) or name in self._hosts


def _host_name(host: str) -> str:
    """The name of a Host header, without port, brackets and a last dot, in lower case."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _forbidden(message: str) -> Response:
    return error_response(RequestError(message, 403, "PermissionDeniedError"))

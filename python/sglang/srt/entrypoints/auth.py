"""Access control: bearer keys, administrative endpoints only on loopback without one, host names and web pages."""

from __future__ import annotations

import contextlib
import hmac

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang.srt.entrypoints.errors import error_response
from sglang.srt.entrypoints.sites import SitePolicy
from sglang.srt.entrypoints.unsupported import UNSUPPORTED_PATHS
from sglang.srt.managers.request_input import RequestError
from sglang.srt.utils.network import is_loopback

# Without a key: probes, and metrics, as upstream's monitoring expects.
OPEN_PATHS = frozenset({"/health", "/health_generate", "/ready", "/metrics"})
# Endpoints by which one client can disturb the others.
ADMIN_PATHS = frozenset({"/abort_request", "/flush_cache", "/start_profile", "/stop_profile"})


class AuthPolicy:
    """The decision for each request.

    With ``admin_api_key`` set, administrative endpoints accept only that key; else they accept ``api_key``. With
    neither, they are open on a loopback address and closed on any other.
    """

    def __init__(self, host: str, api_key: str | None, admin_api_key: str | None):
        self._host = host
        self._api_key = api_key
        self._admin_api_key = admin_api_key
        self.admin_closed = not (api_key or admin_api_key or is_loopback(host))

    def refusal(self, method: str, path: str, authorization: bytes) -> Response | None:
        """None if the request may pass, else its answer: 401 for a missing or wrong key, 403 if no key would be
        accepted."""
        path = "/" + path.strip("/")
        # Unsupported endpoints do nothing: their 501 is more useful than a 401 for a key that may be right upstream.
        if method == "OPTIONS" or path in OPEN_PATHS or path in UNSUPPORTED_PATHS:
            return None
        is_admin = path in ADMIN_PATHS
        if is_admin and self.admin_closed:
            reason = (
                f"{path} is closed: the server listens on {self._host} without a key. Start it with --api-key or "
                "--admin-api-key, or bind it to 127.0.0.1."
            )
            return error_response(RequestError(f"Forbidden: {reason}", 403, "PermissionDeniedError"))
        key = self._admin_api_key or self._api_key if is_admin else self._api_key
        if not key or _has_bearer(authorization, key):
            return None
        message = "Unauthorized: send the server's key as Authorization: Bearer KEY."
        return error_response(RequestError(message, 401, "AuthenticationError", {"WWW-Authenticate": "Bearer"}))


def _has_bearer(authorization: bytes, key: str) -> bool:
    """Whether the header contains ``key``, as UTF-8 or, as older clients write it, as Latin-1."""
    scheme, _, token = authorization.partition(b" ")
    if scheme.lower() != b"bearer":
        return False
    forms = [key.encode()]
    with contextlib.suppress(UnicodeEncodeError):
        forms.append(key.encode("latin-1"))
    return any([hmac.compare_digest(token.strip(), form) for form in forms])


class AuthMiddleware:
    """Checks both policies before any handler runs."""

    def __init__(self, app: ASGIApp, policy: AuthPolicy, sites: SitePolicy):
        self._app = app
        self._policy = policy
        self._sites = sites

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        method, path = scope["method"], scope["path"]
        refusal = self._sites.refusal(method, path, headers)
        if refusal is None:
            refusal = self._policy.refusal(method, path, headers.get(b"authorization", b""))
        await (self._app if refusal is None else refusal)(scope, receive, send)

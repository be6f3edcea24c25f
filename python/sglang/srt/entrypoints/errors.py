"""Error bodies of the API: upstream's flat keys, and the same under ``error``, as in OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from sglang.srt.managers.request_input import RequestError


def json_response(content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """``content`` (structs, dictionaries, lists) as JSON; numbers that JSON lacks become null."""
    return Response(msgspec.json.encode(content), status_code, headers, media_type="application/json")


def error_body(error: RequestError) -> dict[str, Any]:
    """For responses and stream events; the flat ``code`` is the status, the nested one may be a name."""
    body = {"message": error.message, "type": error.err_type, "param": error.param, "code": error.status_code}
    return {"object": "error", **body, "error": {**body, "code": error.code or error.status_code}}


def error_response(error: RequestError) -> Response:
    """The body with the error's status. For a 501, OpenAI's clients are told not to retry."""
    headers = {"x-should-retry": "false", **error.headers} if error.status_code == 501 else error.headers
    return json_response(error_body(error), error.status_code, headers)


def body_error(message: str, param: str | None = None) -> RequestError:
    """For a body that cannot be read: not JSON, of a wrong type, or with a field of a wrong type."""
    return RequestError(message, 400, "Bad Request", param=param)


def http_error(status_code: int, message: str, headers: Mapping[str, str] | None = None) -> RequestError:
    """For errors of HTTP itself (no such path, no such method); the type is the status as text."""
    return RequestError(message, status_code, str(status_code), dict(headers or {}))

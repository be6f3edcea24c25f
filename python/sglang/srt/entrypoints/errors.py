"""Error bodies of the API: flat as upstream's OpenAI endpoints give them, wrapped for ``/generate``."""

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
    body = {"message": error.message, "type": error.err_type, "param": None, "code": error.status_code}
    return {"object": "error", **body}


def openai_error(error: RequestError) -> Response:
    """The flat body, with the error's status."""
    return json_response(error_body(error), error.status_code, error.headers)


def native_error(error: RequestError) -> Response:
    """``{"error": {...}}`` with the flat body inside, as ``/generate`` answers."""
    return json_response({"error": error_body(error)}, error.status_code, error.headers)


def body_error(message: str) -> RequestError:
    """For a body that cannot be read: not JSON, of a wrong type, or with a field of a wrong type."""
    return RequestError(message, 400, "Bad Request")


def http_error(status_code: int, message: str) -> RequestError:
    """For errors of HTTP itself (no such path, no such method); the type is the status as text."""
    return RequestError(message, status_code, str(status_code))

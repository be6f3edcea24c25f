"""Error bodies of the API: flat as upstream's OpenAI endpoints give them, wrapped for ``/generate``."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from sglang.srt.managers.request_input import RequestError


class BodyError(Exception):
    """A request body that cannot be read: not JSON, of a wrong type, or with a field of a wrong type."""

    def __init__(self, message: str):
        super().__init__(message)
        self.message = message


def json_response(content: Any, status_code: int = 200) -> Response:
    """``content`` (structs, dictionaries, lists) as JSON; numbers that JSON lacks become null."""
    return Response(msgspec.json.encode(content), status_code, media_type="application/json")


def flat_error(message: str, err_type: str, code: int, param: str | None = None) -> dict[str, Any]:
    return {"object": "error", "message": message, "type": err_type, "param": param, "code": code}


def error_body(error: RequestError) -> dict[str, Any]:
    return flat_error(error.message, error.err_type, error.status_code)


def openai_error(error: RequestError) -> Response:
    """The flat body, with the error's status."""
    return json_response(error_body(error), error.status_code)


def native_error(error: RequestError) -> Response:
    """``{"error": {...}}`` with the flat body inside, as ``/generate`` answers."""
    return json_response({"error": error_body(error)}, error.status_code)


def body_error(error: BodyError) -> Response:
    return json_response(flat_error(error.message, "Bad Request", 400), 400)


def http_error(status_code: int, message: str) -> Response:
    """For errors of HTTP itself (no such path, no such method); the type is the status as text."""
    return json_response(flat_error(message, str(status_code), status_code), status_code)

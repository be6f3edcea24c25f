"""The start page ``/``, the description of the API, and its page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.entrypoints.endpoint import Endpoint
from sglang.srt.entrypoints.errors import json_response
from sglang.srt.entrypoints.openapi import openapi_document
from sglang.version import __version__


class RootApi:
    """Pages about ``endpoints``, the others of the server."""

    def __init__(self, context: ServerContext, endpoints: Sequence[Endpoint]):
        self._context = context
        needs_key = context.server_args.api_key is not None
        self._document = msgspec.json.encode(openapi_document(endpoints, needs_key))
        self._page = Path(__file__).with_name("docs_page.html").read_text(encoding="utf-8")

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("/", ("GET",), self.root),
            Endpoint("/openapi.json", ("GET",), self.document),
            Endpoint("/docs", ("GET",), self.page),
        ]

    async def root(self, _: Request) -> Response:
        links = {
            "chat": "/v1/chat/completions",
            "completions": "/v1/completions",
            "generate": "/generate",
            "models": "/v1/models",
            "health": "/health",
            "docs": "/docs",
            "openapi": "/openapi.json",
        }
        about = {"name": "sglang", "version": __version__, "model": self._context.served_model_name}
        return json_response({**about, "status": self._context.status.value, "paths": links})

    async def document(self, _: Request) -> Response:
        return Response(self._document, media_type="application/json")

    async def page(self, _: Request) -> Response:
        # Nothing is loaded from anywhere else.
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(self._page, headers={"content-security-policy": policy})

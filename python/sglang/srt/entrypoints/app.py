"""The FastAPI application: which handler answers which path, and the form of errors outside handlers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from sglang.srt.entrypoints.auth import AuthMiddleware, AuthPolicy
from sglang.srt.entrypoints.body_limit import BodyLimit
from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.entrypoints.errors import error_response, http_error
from sglang.srt.entrypoints.http_io import internal_error
from sglang.srt.entrypoints.native_api import NativeApi
from sglang.srt.entrypoints.openai.models_api import ModelsApi
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.entrypoints.sites import SitePolicy, split_list
from sglang.srt.managers.request_input import RequestError, request_limit
from sglang.srt.utils.limits import MAX_QUEUED_REQUESTS
from sglang.version import __version__

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
_MAX_SHOWN_PATH = 256
Route = tuple[str, list[str], Callable[[Request], Awaitable[Response]]]


def build_app(context: ServerContext, lifespan: Lifespan) -> FastAPI:
    """All endpoints over ``context``."""
    app = FastAPI(title="sglang", version=__version__, lifespan=lifespan)
    args = context.server_args
    context.manager.max_requests_per_call = request_limit(args.max_queued_requests or MAX_QUEUED_REQUESTS)
    models = ModelsApi(context)
    routes: list[Route] = [
        *NativeApi(context).routes(),
        ("/v1/completions", ["POST"], OpenAIServingCompletion(context).handle),
        ("/v1/chat/completions", ["POST"], OpenAIServingChat(context).handle),
        ("/v1/models", ["GET"], models.list_models),
        ("/v1/models/{model:path}", ["GET"], models.show_model),
    ]
    for path, methods, handler in routes:
        for method in methods:
            name = f"{method.lower()}{path}"
            app.add_api_route(path, _plain(handler), methods=[method], response_model=None, name=name)
    # The last one added is asked first: who has no key gets no body read.
    app.add_middleware(BodyLimit, max_bytes=args.max_request_bytes)
    policy = AuthPolicy(args.host, args.api_key, args.admin_api_key)
    sites = SitePolicy(args.host, args.api_key is not None, args.allowed_hosts, args.allowed_origins)
    app.add_middleware(AuthMiddleware, policy=policy, sites=sites)
    if origins := split_list(args.allowed_origins):
        # Outside the check of keys, which a pre-flight does not bring.
        cors = {"allow_origins": origins, "allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **cors, expose_headers=["Retry-After"])
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    return app


def _plain(handler: Callable[[Request], Awaitable[Response]]) -> Callable[..., Any]:
    """A function with the one parameter that FastAPI knows how to fill; a defect of ours becomes a 500."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except (RequestError, HTTPException):
            raise
        except Exception as error:
            # Past this point the connection would be closed under the client.
            return error_response(internal_error(error))

    endpoint.__doc__ = handler.__doc__
    return endpoint


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:_MAX_SHOWN_PATH]}"
    return error_response(http_error(error.status_code, f"{error.detail}: {where}", error.headers))

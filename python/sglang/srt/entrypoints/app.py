"""The ASGI application: which handler serves which path, and the format of errors outside handlers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sglang.srt.entrypoints.auth import AuthMiddleware, AuthPolicy
from sglang.srt.entrypoints.body_limit import BodyLimit
from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.entrypoints.endpoint import Endpoint, Handler
from sglang.srt.entrypoints.errors import error_response, http_error
from sglang.srt.entrypoints.full_queue import FullQueue
from sglang.srt.entrypoints.http_io import internal_error
from sglang.srt.entrypoints.native_api import NativeApi
from sglang.srt.entrypoints.openai.models_api import ModelsApi
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.entrypoints.profile_api import ProfileApi
from sglang.srt.entrypoints.root_api import RootApi
from sglang.srt.entrypoints.sites import SitePolicy, split_list
from sglang.srt.managers.request_input import RequestError
from sglang.srt.utils.limits import MAX_QUEUED_REQUESTS, MAX_REQUESTS_PER_CALL

Lifespan = Callable[[Starlette], AbstractAsyncContextManager[None]]
_MAX_SHOWN_PATH = 256


def build_app(context: ServerContext, lifespan: Lifespan) -> Starlette:
    """All endpoints over ``context``."""
    args = context.server_args
    context.manager.max_requests_per_call = min(MAX_REQUESTS_PER_CALL, args.max_queued_requests or MAX_QUEUED_REQUESTS)
    chat = OpenAIServingChat(context)
    endpoints = [
        chat.endpoint(),
        OpenAIServingResponses(context, chat).endpoint(),
        OpenAIServingCompletion(context).endpoint(),
        *ModelsApi(context).endpoints(),
        *NativeApi(context).endpoints(),
        *ProfileApi(context).endpoints(),
    ]
    endpoints += RootApi(context, endpoints).endpoints()
    app = Starlette(routes=[route for endpoint in endpoints for route in _routes(endpoint)], lifespan=lifespan)
    # The last one added runs first: without a key no body is read, and nothing about the queue is disclosed.
    app.add_middleware(BodyLimit, max_bytes=args.max_request_bytes)
    app.add_middleware(FullQueue, manager=context.manager, endpoints=endpoints)
    policy = AuthPolicy(args.host, args.api_key, args.admin_api_key)
    sites = SitePolicy(args.host, args.api_key is not None, args.allowed_hosts, args.allowed_origins)
    app.add_middleware(AuthMiddleware, policy=policy, sites=sites)
    if origins := split_list(args.allowed_origins):
        # Outside the check of keys, because a pre-flight request has none.
        cors: dict[str, Any] = {"allow_origins": origins, "allow_methods": ["*"], "allow_headers": ["*"]}
        app.add_middleware(CORSMiddleware, **cors, expose_headers=["Retry-After"])
    app.add_exception_handler(RequestError, _on_request_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    return app


def _routes(endpoint: Endpoint) -> list[Route]:
    """One route per name of the endpoint; HEAD is accepted with GET, unless the GET changes something."""
    routes = [Route(path, _guarded(endpoint.handler), methods=list(endpoint.methods)) for path in endpoint.paths]
    for route in routes:
        if not endpoint.safe and route.methods is not None:
            route.methods.discard("HEAD")
    return routes


def _guarded(handler: Handler) -> Handler:
    """``handler``, with an unexpected exception as a 500."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handler(request)
        except (RequestError, HTTPException):
            raise
        except Exception as error:
            # Past this point the connection would be closed under the client.
            return error_response(internal_error(error))

    return endpoint


async def _on_request_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:_MAX_SHOWN_PATH]}"
    return error_response(http_error(error.status_code, f"{error.detail}: {where}", error.headers))

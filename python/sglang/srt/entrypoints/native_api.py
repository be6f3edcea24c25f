"""The endpoints outside OpenAI's: /generate, health, information, and administration."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypedDict, TypeVar

import anyio
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints import server_info
from sglang.srt.entrypoints.context import ServerContext, ServerStatus
from sglang.srt.entrypoints.endpoint import Endpoint
from sglang.srt.entrypoints.errors import http_error, json_response
from sglang.srt.entrypoints.full_queue import place_of
from sglang.srt.entrypoints.http_io import (
    CLIENT_CLOSED_REQUEST,
    EventStream,
    answer,
    asked_timeout,
    read_body,
    run_while_connected,
)
from sglang.srt.entrypoints.metrics import metrics_page
from sglang.srt.entrypoints.unsupported import UNSUPPORTED_PATHS
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import GenerateReqInput, RequestId
from sglang.srt.managers.request_input import RequestError
from sglang.srt.utils.limits import MAX_DETOKENIZE_IDS, MAX_TOKENIZE_TEXTS

T = TypeVar("T")
JsonObject = dict[str, Any]

_POLL_S = 0.02
_MAX_FLUSH_WAIT_S = 3600


class AbortBody(msgspec.Struct, forbid_unknown_fields=True):
    rid: RequestId | None = None
    abort_all: bool | None = None


class TokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str | Annotated[list[str], msgspec.Meta(max_length=MAX_TOKENIZE_TEXTS)]
    add_special_tokens: bool | None = None


class DetokenizeBody(msgspec.Struct, forbid_unknown_fields=True):
    tokens: list[int | list[int]]
    skip_special_tokens: bool | None = None


class GenerateResult(TypedDict):
    """One answer; ``meta_info`` holds why it ended, token counts, latency and log-probabilities."""

    text: str
    output_ids: list[int]
    meta_info: JsonObject


class TokenizeResult(TypedDict):
    tokens: list[int | list[int]]
    count: int | list[int]
    max_model_len: int


class DetokenizeResult(TypedDict):
    text: str | list[str]


class NativeApi:
    """Handlers over one server context."""

    def __init__(self, context: ServerContext):
        self._context = context
        self._manager = context.manager

    def endpoints(self) -> list[Endpoint]:
        """All endpoints, the unsupported ones last."""
        generation, state, admin = "Generation", "State of the server", "Administration"
        get, post = ("GET",), ("POST",)
        table = [
            Endpoint(
                "/generate", ("POST", "PUT"), self.generate, generation, "Continue texts or token ids.",
                body=GenerateReqInput, result=GenerateResult | list[GenerateResult], chunk=GenerateResult,
                is_queued=True,
            ),
            Endpoint(
                "/tokenize", post, self.tokenize, generation, "Token ids of texts.", body=TokenizeBody,
                result=TokenizeResult, aliases=("/v1/tokenize",),
            ),
            Endpoint(
                "/detokenize", post, self.detokenize, generation, "Text of token ids.", body=DetokenizeBody,
                result=DetokenizeResult, aliases=("/v1/detokenize",),
            ),
            Endpoint("/health", get, self.health, state, "200 while requests are answered, else 503."),
            Endpoint("/health_generate", get, self.health_generate, state, "200 if a request gets an answer now."),
            Endpoint("/ready", get, self.ping, state, "200 while requests are taken.", aliases=("/ping",)),
            self._info("/model_info", server_info.model_info, "The model that is served.", "/get_model_info"),
            self._info(
                "/server_info", server_info.server_info, "Settings, limits, kernels and counters.", "/get_server_info"
            ),
            self._info("/v1/loads", server_info.loads, "Load of each scheduler."),
            self._info("/get_load", server_info.load, "Load, in the old form.", result=list[JsonObject]),
            Endpoint(
                "/flush_cache", ("GET", "POST"), self.flush_cache, admin, "Drop the prefix cache; 400 while busy.",
                query=(("timeout", "Seconds to wait for the end of running requests."),), safe=False,
            ),
            Endpoint(
                "/abort_request", post, self.abort_request, admin, "End requests by the start of their id, or all.",
                body=AbortBody,
            ),
        ]  # fmt: skip
        if self._context.server_args.enable_metrics:
            table.append(Endpoint("/metrics", get, self.metrics, state, "Counters in Prometheus' format."))
        everything = ("GET", "POST", "PUT", "DELETE")
        return table + [Endpoint(path, everything, self.unsupported) for path in UNSUPPORTED_PATHS]

    async def generate(self, request: Request) -> Response:
        body, warnings = await self._read(request, GenerateReqInput)
        body.request_timeout = asked_timeout(request, body.request_timeout)
        results = self._manager.generate_request(body, warnings=warnings, place=place_of(request))
        if body.stream:
            return EventStream(results)
        result = await answer(request, results)
        return result if isinstance(result, Response) else json_response(result)

    async def _read(self, request: Request, body_type: type[T]) -> tuple[T, list[str]]:
        return await read_body(request, body_type, self._manager.unknown_fields)

    async def health(self, request: Request) -> Response:
        if envs.SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION.get():
            return await self.health_generate(request)
        return await self.ping(request)

    async def ping(self, _: Request) -> Response:
        """200 while requests are taken and answered; else 503 with "starting", "stopping", "stalled" or "failed"."""
        status = self._context.status
        if status is not ServerStatus.UP:
            return Response(status.value, 503)
        if self._context.stalled is not None:
            return Response("stalled", 503)
        return Response("failed", 503) if self._manager.failure is not None else Response()

    async def health_generate(self, request: Request) -> Response:
        """200 if any request gets output within the time window, or if steps run: a busy server is healthy."""
        status = await self.ping(request)
        if status.status_code == 200 and not await self._engine_answers(envs.SGLANG_HEALTH_CHECK_TIMEOUT.get()):
            status = Response(status_code=503)
        return status

    async def _engine_answers(self, timeout_s: float) -> bool:
        """Whether output comes in time or, as some comes at an end alone, two steps: one may be the probe's."""
        manager, started = self._manager, time.monotonic()
        params = {"max_new_tokens": 1, "temperature": 0}
        probe = GenerateReqInput(input_ids=[0], sampling_params=params, rid=f"HEALTH_CHECK_{uuid.uuid4().hex}")

        async def run() -> None:
            with contextlib.suppress(RequestError):
                async for _ in manager.generate_request(probe, is_bounded=False):
                    pass

        task = asyncio.create_task(run())
        try:
            with anyio.fail_after(timeout_s):
                first = await self._num_steps()
                while manager.last_output_time < started and await self._num_steps() < first + 2:
                    await asyncio.sleep(_POLL_S)
            return manager.failure is None
        except (RequestError, TimeoutError):
            return False
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _num_steps(self) -> int:
        states = await self._manager.get_internal_states(brief=True)
        return sum(state["num_prefill_steps"] + state["num_decode_steps"] for state in states)

    def _info(
        self, path: str, read: Callable[[ServerContext], Awaitable[Any]], about: str, *aliases: str,
        result: Any = JsonObject,
    ) -> Endpoint:  # fmt: skip
        async def handler(_: Request) -> Response:
            return json_response(await read(self._context))

        return Endpoint(path, ("GET",), handler, "State of the server", about, result=result, aliases=aliases)

    async def metrics(self, _: Request) -> Response:
        page = await metrics_page(self._context)
        return Response(page, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def flush_cache(self, request: Request) -> Response:
        try:
            timeout_s = float(request.query_params.get("timeout", "0"))
        except ValueError:
            timeout_s = -1.0
        if not 0 <= timeout_s <= _MAX_FLUSH_WAIT_S:
            raise RequestError(f"timeout must be a number of seconds in [0, {_MAX_FLUSH_WAIT_S}].")
        done, outcome = await run_while_connected(request.receive, self._manager.flush_cache(timeout_s))
        if not done or outcome is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        success, message = outcome
        if success:
            return Response("Cache flushed.\n", media_type="text/plain")
        return Response(f"The cache was not flushed. {message}\n", 400, media_type="text/plain")

    async def abort_request(self, request: Request) -> Response:
        body, _ = await self._read(request, AbortBody)
        self._manager.abort_request(body.rid or "", bool(body.abort_all))
        return Response(status_code=200)

    async def tokenize(self, request: Request) -> Response:
        body, _ = await self._read(request, TokenizeBody)
        special = body.add_special_tokens is not False
        prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        tokens = [await self._manager.encode_text(prompt, special) for prompt in prompts]
        counts = [len(ids) for ids in tokens]
        single = isinstance(body.prompt, str)
        result = {"tokens": tokens[0] if single else tokens, "count": counts[0] if single else counts}
        return json_response({**result, "max_model_len": self._context.model_config.context_len})

    async def detokenize(self, request: Request) -> Response:
        unknown = self._manager.unknown_fields
        limits = {"max_items": MAX_DETOKENIZE_IDS, "max_lists": MAX_TOKENIZE_TEXTS}
        body, _ = await read_body(request, DetokenizeBody, unknown, **limits)
        decode = self._manager.decode_ids
        skip = body.skip_special_tokens is not False
        kinds = set(map(type, body.tokens))
        if len(kinds) > 1:
            raise RequestError("tokens must be a list of token ids or a list of such lists, not a mixture.")
        nested: list[list[int]] = body.tokens if kinds == {list} else []  # type: ignore[assignment]
        flat: list[int] = [] if nested else body.tokens  # type: ignore[assignment]
        ids = flat or list(itertools.chain.from_iterable(nested))
        if ids and not 0 <= min(ids) <= max(ids) < self._manager.vocab_size:
            bad = next(i for i in ids if not 0 <= i < self._manager.vocab_size)
            raise RequestError(f"tokens holds {bad}, outside [0, {self._manager.vocab_size}).")
        if nested:
            return json_response({"text": [await decode(ids, skip) for ids in nested]})
        return json_response({"text": await decode(flat, skip)})

    async def unsupported(self, request: Request) -> Response:
        raise http_error(501, f"{request.url.path} exists in upstream sglang and is not implemented by this server.")

"""What chat and text completions share: sampling parameters, usage, finish reasons, and the two ways to answer."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import AbstractContextManager, aclosing
from typing import Any, Generic, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.context import DEFAULT_MODEL_NAME, ServerContext
from sglang.srt.entrypoints.endpoint import Endpoint
from sglang.srt.entrypoints.errors import json_response
from sglang.srt.entrypoints.full_queue import place_of
from sglang.srt.entrypoints.http_io import EventStream, answer, asked_timeout, read_body
from sglang.srt.entrypoints.openai.field_names import in_own_names
from sglang.srt.entrypoints.openai.output_form import READERS, output_form
from sglang.srt.entrypoints.openai.protocol import (
    GenerationRequest,
    GenerationResponse,
    PromptTokensDetails,
    StreamOptions,
    Usage,
)
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_input import RequestError
from sglang.srt.sampling.sampling_params import GRAMMAR_KINDS, SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer

# Body field -> sampling parameter, where the value passes unchanged; null takes the default.
_SAMPLING_FIELDS = {"min_tokens": "min_new_tokens", "seed": "sampling_seed"} | {
    name: name
    for name in GenerationRequest.__struct_fields__
    if name in SamplingParams.__struct_fields__ and name not in GRAMMAR_KINDS
}

# Key of a result's ``meta_info`` where an endpoint that separates thoughts stores the count of their tokens.
REASONING_TOKENS = "reasoning_tokens"

# One result of the tokenizer manager, and the state of each choice of a response.
Result = dict[str, Any]
States = dict[int, Any]
RequestT = TypeVar("RequestT", bound=GenerationRequest)


class UsageCounter:
    """Token counts of a response; each prompt counts once however many samples it has."""

    def __init__(self, samples_per_prompt: int, report_cached: bool):
        self._samples = samples_per_prompt
        self._report_cached = report_cached
        self._last: dict[int, dict[str, Any]] = {}

    def see(self, index: int, meta_info: dict[str, Any]) -> None:
        self._last[index] = meta_info

    def usage(self, only: int | None = None) -> Usage:
        """Of all choices, or of choice ``only``."""
        metas = self._last if only is None else {only: self._last[only]}
        prompts = [meta for i, meta in metas.items() if only is not None or i % self._samples == 0]
        prompt = sum(meta["prompt_tokens"] for meta in prompts)
        completion = sum(meta["completion_tokens"] for meta in metas.values())
        cached = sum(meta["cached_tokens"] for meta in prompts)
        details = PromptTokensDetails(cached) if self._report_cached else None
        reasoning = sum(meta.get(REASONING_TOKENS, 0) for meta in metas.values())
        return Usage(prompt, completion, prompt + completion, details, reasoning)


class OpenAIServing(ABC, Generic[RequestT]):
    """Base of both endpoints; a subclass makes a prompt from a body, and a response from results."""

    path: str
    about: str
    request_type: type[RequestT]
    result_type: Any
    chunk_type: Any
    # The ``object`` of whole responses and of chunks.
    response_object: str
    chunk_object: str

    def __init__(self, context: ServerContext):
        self.context = context
        self.manager = context.manager
        from_model = context.server_args.sampling_defaults == "model"
        self._defaults = dict(context.model_config.generation_defaults) if from_model else {}

    def endpoint(self) -> Endpoint:
        return Endpoint(
            self.path, ("POST",), self.handle, "OpenAI", self.about, self.request_type, result=self.result_type,
            chunk=self.chunk_type, is_queued=True,
        )  # fmt: skip

    async def handle(self, request: Request) -> Response:
        body, warnings = await read_body(request, self.request_type, self.manager.unknown_fields)
        with self.own_names(body):
            native = await self.native(body, warnings)
            native.request_timeout = asked_timeout(request, body.request_timeout)
            results = self.manager.generate_request(native, incremental=True, place=place_of(request))
            if body.stream:
                return EventStream(self.chunks(body, native, results, warnings))
            result = await answer(request, results)
        return result if isinstance(result, Response) else json_response(self.whole(body, native, result, warnings))

    def own_names(self, body: RequestT) -> AbstractContextManager[None]:
        """Errors within it name the fields of ``body``."""
        return in_own_names(self.request_type.__struct_fields__, self.renamed(body))

    def renamed(self, body: RequestT) -> dict[str, str]:
        """Fields of ``body`` by the native names that stand in errors."""
        form = next((name for name in READERS if getattr(body, name) is not None), "tools")
        return {"min_new_tokens": "min_tokens", "sampling_seed": "seed", **dict.fromkeys(GRAMMAR_KINDS, form)}

    async def native(self, body: RequestT, warnings: list[str]) -> GenerateReqInput:
        """The native request of a body, checked. Raises RequestError."""
        self.check(body)
        self.check_keys(body, warnings if body.return_warnings else None)
        native = await self.convert(body)
        # Ids of samples and prompts begin with the id of their response, so that aborting it ends them all.
        native.rid = body.rid or uuid.uuid4().hex
        native.return_text_in_logprobs = True
        native.stream = bool(body.stream)
        native.request_timeout = body.request_timeout
        return native

    def check(self, body: RequestT) -> None:
        """Raise RequestError for what is not supported."""
        self.context.check_model(body.model)
        if self.manager.tokenizer is None:
            raise RequestError("A reply would have no text, because of --skip-tokenizer-init: use /generate.")

    @property
    def tokenizer(self) -> Tokenizer:
        """Of a request that has passed ``check``."""
        assert self.manager.tokenizer is not None
        return self.manager.tokenizer

    def check_keys(self, body: RequestT, warnings: list[str] | None) -> None:
        """Check unknown keys in open parts of the body's type; extends ``warnings``."""

    @abstractmethod
    async def convert(self, body: RequestT) -> GenerateReqInput:
        """The native request of a body. Raises RequestError."""

    @abstractmethod
    def choice(self, body: RequestT, native: GenerateReqInput, index: int, result: Result, states: States) -> Any:
        """Choice ``index`` of a response."""

    @abstractmethod
    def deltas(
        self, body: RequestT, native: GenerateReqInput, index: int, result: Result, states: States
    ) -> Iterator[Any]:
        """The streamed choices, one per chunk, of the new output of choice ``index``."""

    def whole(
        self, body: RequestT, native: GenerateReqInput, result: Result | list[Result], warnings: list[str]
    ) -> GenerationResponse:
        """The response to ``body`` of what the tokenizer manager gave."""
        results = result if isinstance(result, list) else [result]
        counter = self._usage_counter(body)
        for index, result in enumerate(results):
            counter.see(index, result["meta_info"])
        choices = [self.choice(body, native, index, result, {}) for index, result in enumerate(results)]
        model = body.model or DEFAULT_MODEL_NAME
        shown = warnings if body.return_warnings else msgspec.UNSET
        head = str(native.rid), self.response_object, int(time.time()), model
        return GenerationResponse(*head, choices, counter.usage(), shown)

    async def chunks(
        self, body: RequestT, native: GenerateReqInput, results: AsyncGenerator[Any, None], warnings: list[str]
    ) -> AsyncGenerator[GenerationResponse, None]:
        """The chunks of incremental results; the first one shows ``warnings`` if the body asks for them."""
        counter = self._usage_counter(body)
        options = body.stream_options or StreamOptions()
        created, model = int(time.time()), body.model or DEFAULT_MODEL_NAME
        states: States = {}

        show_once: list[str] | msgspec.UnsetType = warnings if body.return_warnings else msgspec.UNSET

        def chunk(choices: list[Any], usage: Usage | None) -> GenerationResponse:
            nonlocal show_once
            head = str(native.rid), self.chunk_object, created, model
            content, show_once = GenerationResponse(*head, choices, usage, show_once), msgspec.UNSET
            return content

        with self.own_names(body):
            async with aclosing(results):
                async for result in results:
                    index = result.get("index", 0)
                    counter.see(index, result["meta_info"])
                    choices = list(self.deltas(body, native, index, result, states))
                    usage = counter.usage(only=index) if options.continuous_usage_stats else None
                    for choice in choices:
                        yield chunk([choice], usage)
        if options.include_usage:
            yield chunk([], counter.usage())

    def sampling_params(self, body: RequestT, max_new_tokens: int | None) -> dict[str, Any]:
        """Raw sampling parameters: the server's defaults, overridden by the body."""
        params = {**self._defaults, "max_new_tokens": max_new_tokens, **self.output_form(body)}
        for source, target in _SAMPLING_FIELDS.items():
            value = getattr(body, source)
            if value is not None:
                params[target] = value
        return params

    def output_form(self, body: RequestT) -> dict[str, Any]:
        """The sampling parameter that constrains the output, if any."""
        return output_form(body)

    def _usage_counter(self, body: RequestT) -> UsageCounter:
        return UsageCounter(body.n or 1, self.context.server_args.enable_cache_report)


def finish(meta_info: dict[str, Any]) -> tuple[str | None, int | str | None]:
    """``finish_reason`` and ``matched_stop`` of a choice."""
    reason = meta_info["finish_reason"]
    return (None, None) if reason is None else (reason["type"], reason.get("matched"))

"""What chat and text completions share: sampling parameters, usage, finish reasons, and the two ways to answer."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator
from typing import Any, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.entrypoints.errors import error_body, json_response, openai_error
from sglang.srt.entrypoints.http_io import EventStream, answer, read_body
from sglang.srt.entrypoints.lacking import refuse_lacking_fields
from sglang.srt.entrypoints.openai.protocol import (
    DEFAULT_MODEL_NAME,
    GenerationRequest,
    PromptTokensDetails,
    Usage,
)
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_input import RequestError

# OpenAI field -> SamplingParams field, where the value passes unchanged; null takes the default.
_SAMPLING_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "min_tokens": "min_new_tokens",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "logit_bias": "logit_bias",
    "n": "n",
    "seed": "sampling_seed",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "no_stop_trim": "no_stop_trim",
    "regex": "regex",
    "ebnf": "ebnf",
    "json_schema": "json_schema",
    "structural_tag": "structural_tag",
    "stop_regex": "stop_regex",
    "custom_logit_processor": "custom_logit_processor",
}

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
        return Usage(prompt, completion, prompt + completion, details)


class OpenAIServing(Generic[RequestT]):
    """Base of both endpoints; a subclass says how to make a prompt of a body and a body of results."""

    request_type: type[RequestT]

    def __init__(self, context: ServerContext):
        self.context = context
        self.manager = context.manager
        from_model = context.server_args.sampling_defaults == "model"
        self._defaults = dict(context.model_config.generation_defaults) if from_model else {}

    async def handle(self, request: Request) -> Response:
        body = await read_body(request, self.request_type)
        try:
            self.check(body)
            native = self.convert(body)
        except RequestError as error:
            return openai_error(error)
        # Samples and prompts of one response share its id as the start of theirs, so that aborting it ends them all.
        native.rid = body.rid or uuid.uuid4().hex
        native.return_text_in_logprobs = True
        native.stream = bool(body.stream)
        results = self.manager.generate_request(native, incremental=True)
        if body.stream:
            chunks = self.stream(body, native, results)
            return EventStream(chunks, openai_error, lambda error: {"error": error_body(error)})
        result = await answer(request, results, openai_error)
        if isinstance(result, Response):
            return result
        return json_response(self.whole(body, native, result if isinstance(result, list) else [result]))

    def check(self, body: RequestT) -> None:
        """Raise RequestError for what cannot be honoured."""
        refuse_lacking_fields(body)

    def convert(self, body: RequestT) -> GenerateReqInput:
        """The native request of a body. Raises RequestError."""
        raise NotImplementedError

    def whole(self, body: RequestT, native: GenerateReqInput, results: list[dict[str, Any]]) -> Any:
        """The response of all results, in order of their indices."""
        raise NotImplementedError

    def stream(
        self, body: RequestT, native: GenerateReqInput, results: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[bytes, None]:
        """The events of incremental results."""
        raise NotImplementedError

    def sampling_params(self, body: RequestT, max_new_tokens: int | None) -> dict[str, Any]:
        """Raw sampling parameters: the server's defaults under what the body says."""
        params = {**self._defaults, "max_new_tokens": max_new_tokens}
        for source, target in _SAMPLING_FIELDS.items():
            value = getattr(body, source)
            if value is not None:
                params[target] = value
        return params

    def usage_counter(self, body: RequestT) -> UsageCounter:
        return UsageCounter(body.n or 1, self.context.server_args.enable_cache_report)

    def model_name(self, body: RequestT) -> str:
        return body.model or DEFAULT_MODEL_NAME


def wants_usage(body: GenerationRequest) -> tuple[bool, bool]:
    """Whether a stream ends with a usage chunk, and whether each chunk carries usage."""
    options = body.stream_options
    return (False, False) if options is None else (bool(options.include_usage), bool(options.continuous_usage_stats))


def finish(meta_info: dict[str, Any]) -> tuple[str | None, int | str | None]:
    """``finish_reason`` and ``matched_stop`` of a choice."""
    reason = meta_info["finish_reason"]
    return (None, None) if reason is None else (reason["type"], reason.get("matched"))

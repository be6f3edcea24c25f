"""``/v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from sglang.srt.entrypoints.http_io import event
from sglang.srt.entrypoints.openai.protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from sglang.srt.entrypoints.openai.serving_base import OpenAIServing, finish, wants_usage
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_input import RequestError

DEFAULT_MAX_TOKENS = 16


class OpenAIServingCompletion(OpenAIServing[CompletionRequest]):
    request_type = CompletionRequest

    def check(self, body: CompletionRequest) -> None:
        super().check(body)
        if body.suffix:
            raise RequestError("suffix is not supported: the model completes text, it does not fill a middle.")
        if body.logprobs is not None and body.logprobs < 0:
            raise RequestError(f"logprobs must be at least 0, got {body.logprobs}.")
        if body.echo and self.manager.tokenizer is None:
            raise RequestError("echo needs a tokenizer, and the server runs with --skip-tokenizer-init.")

    def convert(self, body: CompletionRequest) -> GenerateReqInput:
        prompt = body.prompt
        if isinstance(prompt, str):
            text, ids = prompt, None
        elif all(isinstance(item, str) for item in prompt) and prompt:
            text, ids = prompt, None
        elif any(isinstance(item, str) for item in prompt):
            raise RequestError("prompt must be text, a list of texts, token ids, or lists of token ids, not a mixture.")
        else:
            text, ids = None, prompt
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        return GenerateReqInput(
            text=text,  # type: ignore[arg-type]
            input_ids=ids,  # type: ignore[arg-type]
            sampling_params=self.sampling_params(body, max_tokens),
            return_logprob=body.logprobs is not None,
            top_logprobs_num=body.logprobs or 0,
            logprob_start_len=0 if body.echo else -1,
        )

    def whole(
        self, body: CompletionRequest, native: GenerateReqInput, results: list[dict[str, Any]]
    ) -> CompletionResponse:
        counter = self.usage_counter(body)
        choices = []
        for index, result in enumerate(results):
            meta = result["meta_info"]
            counter.see(index, meta)
            prompt = self._echoed(body, native, index)
            logprobs = None
            if body.logprobs is not None:
                logprobs = CompletionLogprobs(top_logprobs=[] if body.logprobs else None)
                self._extend(body, logprobs, meta, bool(body.echo), 0)
            choices.append(CompletionChoice(index, prompt + result["text"], logprobs, *finish(meta)))
        return CompletionResponse(str(native.rid), self.model_name(body), choices, usage=counter.usage())

    async def stream(
        self, body: CompletionRequest, native: GenerateReqInput, results: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[bytes, None]:
        counter = self.usage_counter(body)
        last_usage, each_usage = wants_usage(body)
        response_id, model, created = str(native.rid), self.model_name(body), int(time.time())
        offsets: dict[int, int] = {}
        async with aclosing(results):
            async for result in results:
                index, meta, text = result.get("index", 0), result["meta_info"], result["text"]
                counter.see(index, meta)
                first = index not in offsets
                logprobs = None
                if body.logprobs is not None:
                    logprobs = CompletionLogprobs(top_logprobs=[] if body.logprobs else None)
                    with_prompt = bool(first and body.echo)
                    offsets[index] = self._extend(body, logprobs, meta, with_prompt, offsets.get(index, 0))
                if first:
                    offsets.setdefault(index, 0)
                    text = self._echoed(body, native, index) + text
                reason, matched = finish(meta)
                if not (text or reason or logprobs):
                    continue
                chunk = CompletionResponse(
                    response_id, model, [CompletionChoice(index, text, logprobs, reason, matched)], created=created
                )
                chunk.usage = counter.usage(only=index) if each_usage else None
                yield event(chunk)
        if last_usage:
            yield event(CompletionResponse(response_id, model, [], created=created, usage=counter.usage()))

    def _echoed(self, body: CompletionRequest, native: GenerateReqInput, index: int) -> str:
        """The prompt's text of choice ``index`` if the client wants it back."""
        if not body.echo:
            return ""
        number = index // (body.n or 1)
        if native.text is not None:
            return native.text if isinstance(native.text, str) else native.text[number]
        ids: Any = native.input_ids
        assert self.manager.tokenizer is not None
        return self.manager.tokenizer.decode(ids[number] if isinstance(ids[0], list) else ids)

    def _extend(
        self,
        body: CompletionRequest,
        logprobs: CompletionLogprobs,
        meta: dict[str, Any],
        with_prompt: bool,
        text_offset: int,
    ) -> int:
        """Append a result's log-probabilities; ``text_offset`` is the first token's. Returns the next token's."""
        tokenizer = self.manager.tokenizer
        hidden = tokenizer.all_special_ids if tokenizer and body.skip_special_tokens is not False else frozenset()
        for logprob, token_id, text in [
            *(meta["input_token_logprobs"] if with_prompt else []),
            *meta["output_token_logprobs"],
        ]:
            logprobs.tokens.append(text or "")
            logprobs.token_logprobs.append(logprob)
            logprobs.text_offset.append(text_offset)
            text_offset += 0 if token_id in hidden else len(text or "")
        if logprobs.top_logprobs is not None:
            for row in [*(meta["input_top_logprobs"] if with_prompt else []), *meta["output_top_logprobs"]]:
                entry = None if row is None else {text or "": logprob for logprob, _, text in row}
                logprobs.top_logprobs.append(entry)
        return text_offset

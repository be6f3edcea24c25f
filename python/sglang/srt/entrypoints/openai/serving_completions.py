"""``/v1/completions``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang.srt.entrypoints.openai.protocol import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from sglang.srt.entrypoints.openai.serving_base import Offsets, OpenAIServing, Result, finish
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_input import RequestError
from sglang.srt.utils.limits import MAX_TOP_LOGPROBS

DEFAULT_MAX_TOKENS = 16


class OpenAIServingCompletion(OpenAIServing[CompletionRequest]):
    request_type = CompletionRequest
    response_object = chunk_object = "text_completion"

    def check(self, body: CompletionRequest) -> None:
        super().check(body)
        if body.suffix:
            raise RequestError("suffix is not supported: the model completes text, it does not fill a middle.")
        if not 0 <= (body.logprobs or 0) <= MAX_TOP_LOGPROBS:
            raise RequestError(f"logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {body.logprobs}.")
        if body.best_of not in (None, body.n or 1):
            raise RequestError(f"best_of {body.best_of} is not supported: every sample is returned. Use n.")
        if body.echo and self.manager.tokenizer is None:
            raise RequestError("echo needs a tokenizer, and the server runs with --skip-tokenizer-init.")

    async def convert(self, body: CompletionRequest) -> GenerateReqInput:
        prompt: Any = body.prompt
        is_text = isinstance(prompt, str) or bool(prompt) and all(isinstance(item, str) for item in prompt)
        if not is_text and any(isinstance(item, str) for item in prompt):
            raise RequestError("prompt must be text, a list of texts, token ids, or lists of token ids, not a mixture.")
        max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
        return GenerateReqInput(
            text=prompt if is_text else None,
            input_ids=None if is_text else prompt,
            sampling_params=self.sampling_params(body, max_tokens),
            return_logprob=body.logprobs is not None,
            top_logprobs_num=body.logprobs or 0,
            logprob_start_len=0 if body.echo else -1,
        )

    def choice(
        self, body: CompletionRequest, native: GenerateReqInput, index: int, result: Result, offsets: Offsets
    ) -> CompletionChoice:
        """What is new of choice ``index``, at first behind its prompt if the client wants that back.

        ``offsets`` are the characters, prompt included, of the tokens whose log-probabilities each choice has had.
        """
        meta, text, logprobs = result["meta_info"], result["text"], None
        first = index not in offsets
        offset = offsets.setdefault(index, 0)
        if first:
            text = self._echoed(body, native, index) + text
        if body.logprobs is not None:
            logprobs = CompletionLogprobs(top_logprobs=[] if body.logprobs else None)
            offsets[index] = self._extend(body, logprobs, meta, bool(first and body.echo), offset)
        return CompletionChoice(index, text, logprobs, *finish(meta))

    def deltas(
        self, body: CompletionRequest, native: GenerateReqInput, index: int, result: Result, offsets: Offsets
    ) -> Iterator[CompletionChoice]:
        choice = self.choice(body, native, index, result, offsets)
        if choice.text or choice.finish_reason or choice.logprobs:
            yield choice

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

"""``/v1/completions``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sglang.srt.entrypoints.openai.completion_logprobs import ChoiceLogprobs
from sglang.srt.entrypoints.openai.protocol import CompletionChoice, CompletionRequest, GenerationResponse
from sglang.srt.entrypoints.openai.serving_base import OpenAIServing, Result, States, finish
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_input import RequestError
from sglang.srt.utils.limits import MAX_TOP_LOGPROBS

DEFAULT_MAX_TOKENS = 16


class OpenAIServingCompletion(OpenAIServing[CompletionRequest]):
    path, about = "/v1/completions", "Continue texts or token ids."
    request_type = CompletionRequest
    result_type = chunk_type = GenerationResponse[CompletionChoice]
    response_object = chunk_object = "text_completion"

    def check(self, body: CompletionRequest) -> None:
        super().check(body)
        if body.suffix:
            raise RequestError("suffix is not supported: the model continues text, it does not fill in the middle.")
        if not 0 <= (body.logprobs or 0) <= MAX_TOP_LOGPROBS:
            raise RequestError(f"logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {body.logprobs}.")
        if body.best_of not in (None, body.n or 1):
            raise RequestError(f"best_of {body.best_of} is not supported: every sample is returned. Use n.")

    def renamed(self, body: CompletionRequest) -> dict[str, str]:
        start = "logprob_start_len of /generate"
        names = {"input_ids": "prompt", "top_logprobs_num": "logprobs", "logprob_start_len": start}
        return super().renamed(body) | {"max_new_tokens": "max_tokens", **names}

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
        self, body: CompletionRequest, native: GenerateReqInput, index: int, result: Result, states: States
    ) -> CompletionChoice:
        """What is new of choice ``index``, at first after its prompt if the client wants that back."""
        meta, text, prompt = result["meta_info"], result["text"], None
        if index not in states:
            skip_special = body.skip_special_tokens is not False
            states[index] = ChoiceLogprobs(self.tokenizer, skip_special, bool(body.logprobs))
            prompt = self._echoed(body, native, index) if body.echo else None
        text = (prompt or "") + text
        reason, matched = finish(meta)
        logprobs = None
        if body.logprobs is not None:
            if prompt is not None:
                states[index].add_prompt(prompt, native.text is not None, meta)
            states[index].add_output(meta)
            logprobs = states[index].release(len(text), final=reason is not None)
        return CompletionChoice(index, text, logprobs, reason, matched)

    def deltas(
        self, body: CompletionRequest, native: GenerateReqInput, index: int, result: Result, states: States
    ) -> Iterator[CompletionChoice]:
        choice = self.choice(body, native, index, result, states)
        if choice.text or choice.finish_reason or (choice.logprobs and choice.logprobs.tokens):
            yield choice

    def _echoed(self, body: CompletionRequest, native: GenerateReqInput, index: int) -> str:
        """The prompt's text of choice ``index``; token ids are read as the output is."""
        number = index // (body.n or 1)
        if native.text is not None:
            return native.text if isinstance(native.text, str) else native.text[number]
        ids: Any = native.input_ids
        return self.tokenizer.decode(
            ids[number] if isinstance(ids[0], list) else ids, body.skip_special_tokens is not False
        )

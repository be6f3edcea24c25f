"""``/v1/chat/completions``."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.entrypoints.openai.message_fields import check_message_keys
from sglang.srt.entrypoints.openai.offered_tools import offered_tools
from sglang.srt.entrypoints.openai.protocol import (
    ChatChoice,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    ChatMessage,
    ChatStreamChoice,
    GenerationResponse,
    MessageToolCall,
    TopLogprob,
)
from sglang.srt.entrypoints.openai.reply_reader import ReplyParsers, ReplyReader
from sglang.srt.entrypoints.openai.serving_base import REASONING_TOKENS, OpenAIServing, Result, States, finish
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_input import RequestError
from sglang.srt.sampling.sampling_params import GRAMMAR_KINDS
from sglang.srt.utils.chat_messages import ChatTemplateError
from sglang.srt.utils.limits import MAX_CHAT_TOP_LOGPROBS


class OpenAIServingChat(OpenAIServing[ChatCompletionRequest]):
    path, about = "/v1/chat/completions", "The next turn of a conversation."
    request_type = ChatCompletionRequest
    result_type, chunk_type = GenerationResponse[ChatChoice], GenerationResponse[ChatStreamChoice]
    response_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, context: ServerContext):
        super().__init__(context)
        self.parsers = ReplyParsers(context)

    def check(self, body: ChatCompletionRequest) -> None:
        super().check(body)
        self.parsers.check(body)
        if body.modalities and body.modalities != ["text"]:
            raise RequestError(f"modalities {body.modalities} are not supported: the server answers with text.")
        if body.top_logprobs is not None and not body.logprobs:
            raise RequestError("top_logprobs needs logprobs: true.")
        if not 0 <= (body.top_logprobs or 0) <= MAX_CHAT_TOP_LOGPROBS:
            raise RequestError(f"top_logprobs must be in [0, {MAX_CHAT_TOP_LOGPROBS}], got {body.top_logprobs}.")

    def renamed(self, body: ChatCompletionRequest) -> dict[str, str]:
        prompt = "messages" if body.input_ids is None else "input_ids"
        limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
        names = {"max_new_tokens": limit, "input_ids": prompt, "top_logprobs_num": "top_logprobs"}
        return super().renamed(body) | names

    def check_keys(self, body: ChatCompletionRequest, warnings: list[str] | None) -> None:
        template = self.tokenizer.chat_template
        source = "" if template is None else template.source
        check_message_keys(body.messages, source, self.manager.unknown_fields, warnings)
        if warnings is None:
            return
        self.parsers.warn(body, warnings)
        strict = [tool["function"]["name"] for tool in body.tools or () if tool["function"].get("strict") is True]
        if strict:
            warnings.append(f"strict is not enforced: arguments of {', '.join(strict):.200} may not follow the schema.")

    async def convert(self, body: ChatCompletionRequest) -> GenerateReqInput:
        limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        params = self.sampling_params(body, limit)
        # A request that will be refused is not worth rendering and tokenizing.
        self.manager.verified_params(params)
        native = GenerateReqInput(
            input_ids=list(body.input_ids) if body.input_ids is not None else await self._prompt_ids(body),
            sampling_params=params,
            return_logprob=bool(body.logprobs),
            top_logprobs_num=body.top_logprobs or 0,
        )
        if any(name in params for name in GRAMMAR_KINDS):
            native.require_reasoning = self.parsers.begins_in_thought(body, native) or False
        return native

    def output_form(self, body: ChatCompletionRequest) -> dict[str, Any]:
        return self.parsers.form(body, super().output_form(body))

    def choice(
        self, body: ChatCompletionRequest, native: GenerateReqInput, index: int, result: Result, states: States
    ) -> ChatChoice:
        meta = result["meta_info"]
        reader = self.parsers.reader(body, native)
        deltas = reader.read(result["text"], result["output_ids"], is_last=True)
        meta[REASONING_TOKENS] = reader.reasoning_tokens
        content = "".join(delta.content or "" for delta in deltas)
        thought = "".join(delta.reasoning_content or "" for delta in deltas) or None
        calls = [MessageToolCall(call.id, call.function) for delta in deltas for call in delta.tool_calls or []] or None
        message = ChatMessage("assistant", content or (None if thought or calls else ""), thought, calls)
        reason, matched = finish(meta)
        return ChatChoice(index, message, self._logprobs(body, meta), reader.finish_reason(reason), matched)

    def deltas(
        self, body: ChatCompletionRequest, native: GenerateReqInput, index: int, result: Result, states: States
    ) -> Iterator[ChatStreamChoice]:
        meta = result["meta_info"]
        if index not in states:
            states[index] = self.parsers.reader(body, native)
            yield ChatStreamChoice(index, ChatDelta("assistant", ""))
        logprobs = self._logprobs(body, meta)
        reason, matched = finish(meta)
        reader: ReplyReader = states[index]
        deltas = reader.read(result["text"], result["output_ids"], is_last=reason is not None)
        meta[REASONING_TOKENS] = reader.reasoning_tokens
        if not deltas and logprobs and logprobs.content:
            deltas = [ChatDelta(content="")]
        for delta in deltas:
            yield ChatStreamChoice(index, delta, logprobs)
            logprobs = None
        if reason is not None:
            yield ChatStreamChoice(index, ChatDelta(), None, reader.finish_reason(reason), matched)

    async def _prompt_ids(self, body: ChatCompletionRequest) -> list[Any]:
        variables = dict(body.chat_template_kwargs or {})
        if body.reasoning_effort is not None:
            variables.setdefault("reasoning_effort", body.reasoning_effort)
        try:
            # In a thread: a checkpoint's template may take seconds.
            text = await asyncio.to_thread(
                self.tokenizer.apply_chat_template,
                body.messages,
                tools=body.tools if offered_tools(body) else None,
                continue_final_message=bool(body.continue_final_message),
                variables=variables,
            )
        except ChatTemplateError as error:
            raise RequestError(str(error), param=error.param) from None
        return list(await self.manager.encode_text(text, add_special_tokens=False))

    def _logprobs(self, body: ChatCompletionRequest, meta: dict[str, Any]) -> ChatLogprobs | None:
        if not body.logprobs:
            return None
        tops = meta.get("output_top_logprobs") or [[]] * len(meta["output_token_logprobs"])
        content = []
        for (logprob, token_id, text), row in zip(meta["output_token_logprobs"], tops, strict=True):
            top = [TopLogprob(t or "", self._bytes(i, t), lp) for lp, i, t in row or []]
            content.append(ChatLogprob(text or "", self._bytes(token_id, text), logprob, top))
        return ChatLogprobs(content)

    def _bytes(self, token_id: int, text: str | None) -> list[int]:
        """The bytes of a token, because its text shows half a character as a replacement character."""
        if self.tokenizer.is_byte_level:
            return list(self.tokenizer.token_bytes(token_id))
        return list((text or "").encode("utf-8"))

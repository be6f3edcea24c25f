"""Splits the text of one choice into what the chat endpoint returns: thought, answer and tool calls."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from typing import Any

from sglang.srt.configs.errors import ConfigError
from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.entrypoints.openai.offered_tools import forced_tools, max_calls, offered_tools
from sglang.srt.entrypoints.openai.output_form import answer_schema
from sglang.srt.entrypoints.openai.protocol import CalledFunction, ChatCompletionRequest, ChatDelta, DeltaToolCall
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_grammar import json_options
from sglang.srt.managers.request_input import RequestError
from sglang.srt.parser.reasoning_parser import (
    REASONING_PARSERS,
    THINK_END,
    THINK_START,
    ReasoningParser,
    continues_thought,
    opens_thought,
)
from sglang.srt.parser.tool_call_parser import Event, ToolCallParser
from sglang.srt.parser.tool_calls import TOOL_CALL_PARSERS
from sglang.srt.utils.hf_tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Tokens at the end of a prompt that may hold the mark of a thought and the white space after it.
_PROMPT_END_TOKENS = 32


class ReplyReader:
    """Processes the results of one choice; ``reasoning`` None leaves all text in the answer, ``tools`` None all calls.

    ``shows_thought_late`` gives the thought as a whole, at its end. ``reasoning_tokens`` counts the tokens of a thought
    and its marks; where the end mark is no token of its own (``end_id`` None), those of its text.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tools: ToolCallParser | None,
        shows_thought_late: bool,
        tokenizer: Tokenizer | None,
        end_id: int | None,
    ):
        self._reasoning = reasoning
        self._tools = tools
        self._num_calls = 0
        self._late = shows_thought_late
        self._tokenizer = tokenizer
        self._end_id = end_id
        self._kept = ""
        self._has_thought = reasoning is not None and reasoning.is_thinking
        self._num_tokens = 0
        self._past_end = False

    def read(self, text: str, ids: Sequence[int], is_last: bool) -> list[ChatDelta]:
        """What is new to show, in order, after ``text`` and its tokens ``ids``."""
        if self._reasoning is None:
            return self._spoken(text, is_last)
        pieces = [self._reasoning.feed(text)]
        if is_last:
            pieces.append(self._reasoning.finish())
        thought, answer = "".join(piece[0] for piece in pieces), "".join(piece[1] for piece in pieces)
        self._count(thought, ids)
        if self._late:
            self._kept += thought
            thought = ""
            if is_last or not self._reasoning.is_thinking:
                thought, self._kept = self._kept, ""
        deltas = [ChatDelta(reasoning_content=thought)] if thought else []
        return deltas + self._spoken(answer, is_last)

    def _spoken(self, answer: str, is_last: bool) -> list[ChatDelta]:
        if self._tools is None:
            return [ChatDelta(content=answer)] if answer else []
        events = self._tools.feed(answer)
        if is_last:
            events += self._tools.finish()
        return [self._delta(event) for event in events]

    def _delta(self, event: Event) -> ChatDelta:
        if isinstance(event, str):
            return ChatDelta(content=event)
        call = DeltaToolCall(
            self._num_calls, f"call_{uuid.uuid4().hex[:24]}", CalledFunction(event.name, event.arguments)
        )
        self._num_calls += 1
        return ChatDelta(tool_calls=[call])

    def finish_reason(self, reason: str | None) -> str | None:
        """``reason``, or "tool_calls" where the reply ends with calls for the client to make."""
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    @property
    def reasoning_tokens(self) -> int:
        return self._num_tokens if self._has_thought else 0

    def _count(self, thought: str, ids: Sequence[int]) -> None:
        assert self._reasoning is not None
        self._has_thought = self._has_thought or bool(thought) or self._reasoning.is_thinking
        if self._past_end:
            return
        if self._end_id is None:
            assert self._tokenizer is not None
            self._num_tokens += self._tokenizer.count_tokens(thought) if thought else 0
        elif self._end_id in ids:
            self._past_end = True
            self._num_tokens += ids.index(self._end_id) + 1
        else:
            self._num_tokens += len(ids)


class ReplyParsers:
    """The parsers that the server was started with. Raises ConfigError if the tokenizer leaves their marks out of
    decoded text."""

    def __init__(self, context: ServerContext):
        args = context.server_args
        self._reasoning = args.reasoning_parser
        self._tool_calls = None if args.tool_call_parser is None else TOOL_CALL_PARSERS[args.tool_call_parser]
        self._tokenizer = context.manager.tokenizer
        self._args = args
        self._end_id: int | None = None
        if self._tokenizer is None:
            return
        self._end_id = self._tokenizer.token_id(THINK_END)
        if self._reasoning is not None:
            self._check_marks(f"--reasoning-parser {self._reasoning}", (THINK_START, THINK_END))
        if self._tool_calls is not None:
            self._check_marks(f"--tool-call-parser {args.tool_call_parser}", self._tool_calls.all_marks())

    def _check_marks(self, flag: str, marks: Sequence[str]) -> None:
        tokenizer = self._tokenizer
        assert tokenizer is not None
        for mark in marks:
            token_id = tokenizer.token_id(mark)
            if token_id is not None and tokenizer.decode([token_id]) != mark:
                raise ConfigError(
                    f"{flag} looks for {mark}, which this tokenizer leaves out of decoded text as a special token. "
                    "Start the server without the flag."
                )
        template = tokenizer.chat_template
        if template is not None and not any(mark in template.source for mark in marks):
            logger.warning(
                "%s looks for %s, which the chat template does not contain: is this the right parser for the model?",
                flag, " ".join(marks),
            )  # fmt: skip

    def check(self, body: ChatCompletionRequest) -> None:
        """Raise RequestError for what needs a parser that is not there, and for tools that are malformed."""
        if offered_tools(body) and self._tool_calls is None:
            raise RequestError(
                "tools are not supported by this server: it was started without --tool-call-parser, so no call would "
                "be recognised.",
                param="tools",
            )

    def warn(self, body: ChatCompletionRequest, warnings: list[str]) -> None:
        """Add what the body requests in vain to ``warnings``; upstream's router always requests separate reasoning."""
        if body.separate_reasoning and self._reasoning is None:
            warnings.append("separate_reasoning has no effect: the server was started without --reasoning-parser.")

    def reader(self, body: ChatCompletionRequest, native: GenerateReqInput) -> ReplyReader:
        """The reader of one choice of the reply to ``body``, whose prompt is ``native``'s."""
        reasoning = None
        if self._reasoning is not None and body.separate_reasoning is not False:
            reasoning = ReasoningParser(self.begins_in_thought(body, native))
        tools = offered_tools(body)
        calls = None
        if tools and self._tool_calls is not None:
            calls = self._tool_calls(tools, max_calls=max_calls(body))
        return ReplyReader(reasoning, calls, body.stream_reasoning is False, self._tokenizer, self._end_id)

    def form(self, body: ChatCompletionRequest, form: dict[str, Any]) -> dict[str, Any]:
        """The sampling parameter that constrains the reply: ``form``, unless a tool may be called. Raises RequestError.

        A reply that must be a call is one; else one that may be a call is that, or follows the JSON schema of ``form``.
        """
        tools, schema = offered_tools(body), form.get("json_schema")
        if self._tool_calls is None or self._tokenizer is None or not tools:
            return form
        forced, token_id = forced_tools(body), self._tokenizer.token_id
        if forced and form and schema is None:
            raise RequestError(f"{min(form)} excludes the call of tool_choice: drop one of them.", param="tool_choice")
        if forced:
            return {"ebnf": self._tool_calls.grammar(forced, max_calls(body), token_id)}
        if schema is None:
            return form
        answer = answer_schema(schema, json_options(self._args))
        return {"ebnf": self._tool_calls.grammar(tools, max_calls(body), token_id, answer)}

    def begins_in_thought(self, body: ChatCompletionRequest, native: GenerateReqInput) -> bool | None:
        """Whether the reply continues with a thought; None where it may begin one, and for all where no parser is."""
        if self._tokenizer is None or self._reasoning is None:
            return None
        if body.continue_final_message and body.input_ids is None:
            content = body.messages[-1].get("content") or ""
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            return continues_thought(text) or False
        ids: list[Any] = native.input_ids or []
        opens = opens_thought(self._tokenizer.decode(ids[-_PROMPT_END_TOKENS:], skip_special_tokens=False))
        return opens if opens is not None else REASONING_PARSERS[self._reasoning] or None

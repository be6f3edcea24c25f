"""From the text of one choice to what the chat endpoint shows of it: thought and answer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from sglang.srt.configs.errors import ConfigError
from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest, ChatDelta
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_input import RequestError
from sglang.srt.parser.reasoning_parser import (
    REASONING_PARSERS,
    THINK_END,
    ReasoningParser,
    continues_thought,
    opens_thought,
)
from sglang.srt.utils.hf_tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# Tokens at the end of a prompt that may hold the mark of a thought and the white space behind it.
_PROMPT_END_TOKENS = 32


class ReplyReader:
    """Eats the results of one choice; ``reasoning`` None leaves all text in the answer.

    ``shows_thought_late`` gives the thought as a whole, at its end. ``reasoning_tokens`` counts the tokens of a thought
    and its marks; where the end mark is no token of its own (``end_id`` None), those of its text.
    """

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        shows_thought_late: bool,
        tokenizer: Tokenizer | None,
        end_id: int | None,
    ):
        self._reasoning = reasoning
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
            return [ChatDelta(content=text)] if text else []
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
        return [*deltas, ChatDelta(content=answer)] if answer else deltas

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
    """The parsers that the server was started with. Raises ConfigError where the tokenizer hides their marks."""

    def __init__(self, context: ServerContext):
        self._reasoning = context.server_args.reasoning_parser
        self._tokenizer = context.manager.tokenizer
        self._end_id = None
        if self._reasoning is None or self._tokenizer is None:
            return
        self._end_id = self._tokenizer.token_id(THINK_END)
        if self._end_id is not None and self._tokenizer.decode([self._end_id]) != THINK_END:
            raise ConfigError(
                f"--reasoning-parser {self._reasoning} looks for {THINK_END}, which this tokenizer leaves out of its "
                "text as a special token. Serve without the flag."
            )
        template = self._tokenizer.chat_template
        if template is not None and THINK_END not in template.source:
            logger.warning(
                "--reasoning-parser %s looks for %s, which the chat template does not know: is the model one that "
                "thinks, and of this kind?", self._reasoning, THINK_END,
            )  # fmt: skip

    def check(self, body: ChatCompletionRequest) -> None:
        """Raise RequestError for what needs a parser that is not there."""
        if body.separate_reasoning and self._reasoning is None:
            raise RequestError(
                "separate_reasoning is not supported by this server: it was started without --reasoning-parser. "
                "Remove the field.",
                param="separate_reasoning",
            )

    def reader(self, body: ChatCompletionRequest, native: GenerateReqInput) -> ReplyReader:
        """The reader of one choice of the reply to ``body``, whose prompt is ``native``'s."""
        reasoning = None
        if self._reasoning is not None and body.separate_reasoning is not False:
            reasoning = ReasoningParser(self._begins_in_thought(body, native))
        return ReplyReader(reasoning, body.stream_reasoning is False, self._tokenizer, self._end_id)

    def _begins_in_thought(self, body: ChatCompletionRequest, native: GenerateReqInput) -> bool | None:
        assert self._tokenizer is not None and self._reasoning is not None
        if body.continue_final_message and body.input_ids is None:
            content = body.messages[-1].get("content") or ""
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            return continues_thought(text) or False
        ids = native.input_ids or []
        opens = opens_thought(self._tokenizer.decode(ids[-_PROMPT_END_TOKENS:], skip_special_tokens=False))
        return opens if opens is not None else REASONING_PARSERS[self._reasoning] or None

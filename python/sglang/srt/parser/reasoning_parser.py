"""Separates the thought of a model from its answer, in a reply that arrives in pieces."""

from __future__ import annotations

from sglang.srt.parser.text_marks import partial_mark

THINK_START = "<think>"
THINK_END = "</think>"
# Per value of --reasoning-parser: whether a reply begins inside a thought if the prompt does not decide.
REASONING_PARSERS = {
    "deepseek-r1": True,
    "deepseek-v3": False,
    "deepseek-v31": False,
    "deepseek-v4": False,
    "qwen3": False,
}


def opens_thought(prompt_end: str) -> bool | None:
    """Whether a reply after ``prompt_end`` begins inside a thought; None if the prompt does not end with a mark."""
    end = prompt_end.rstrip()
    if end.endswith(THINK_START):
        return True
    return False if end.endswith(THINK_END) else None


def continues_thought(message: str) -> bool | None:
    """The same for a reply that continues ``message``, the begun text of an assistant."""
    start, end = message.rfind(THINK_START), message.rfind(THINK_END)
    return None if start == end else start > end


class ReasoningParser:
    """Processes the text of one reply and returns thought and answer, independent of how the text is split.

    ``thinks`` is where the reply begins: True inside a thought, False in the answer, None if that is unknown: then it
    begins inside a thought if its text begins with ``<think>``. White space around a thought, and between it and the
    answer, belongs to neither. There is one thought: later marks are text of the answer.
    """

    def __init__(self, thinks: bool | None):
        # Text that is not returned yet: it may be the start of a mark, or the white space at an end.
        self._held = ""
        # At the beginning of a thought or after one, where white space is dropped.
        self._drops_space = thinks is True
        # The reply may repeat the opening mark, although the prompt has opened the thought.
        self._may_open = thinks is not False
        self.is_thinking = thinks is True

    def feed(self, text: str) -> tuple[str, str]:
        """New text of the thought and of the answer after ``text``."""
        self._held += text
        if self._may_open and not self._read_opening():
            return "", ""
        thought = self._read_thought() if self.is_thinking else ""
        return thought, "" if self.is_thinking else self._read_answer()

    def finish(self) -> tuple[str, str]:
        """The remaining text of both at the end of the reply."""
        held, self._held = self._held, ""
        return (held.strip() if self._drops_space else held.rstrip(), "") if self.is_thinking else ("", held)

    def _read_opening(self) -> bool:
        """Decide how the reply begins; False while its text is too short for that."""
        begun = self._held.lstrip()
        if len(begun) < len(THINK_START) and THINK_START.startswith(begun):
            return False
        self._may_open = False
        if begun.startswith(THINK_START):
            self._held = begun[len(THINK_START) :]
            self.is_thinking = self._drops_space = True
        return True

    def _read_thought(self) -> str:
        if self._drops_space:
            self._held = self._held.lstrip()
        thought, end, rest = self._held.partition(THINK_END)
        if end:
            self._held, self.is_thinking, self._drops_space = rest, False, True
            return thought.rstrip()
        kept = len(self._held) - partial_mark(self._held, (THINK_END,))
        kept = len(self._held[:kept].rstrip())
        thought, self._held = self._held[:kept], self._held[kept:]
        self._drops_space = self._drops_space and not thought
        return thought

    def _read_answer(self) -> str:
        if self._drops_space:
            self._held = self._held.lstrip()
            self._drops_space = not self._held
        answer, self._held = self._held, ""
        return answer

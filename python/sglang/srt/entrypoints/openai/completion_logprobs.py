"""Log-probabilities of ``/v1/completions``: unique keys of tokens, and their offsets in the returned text."""

from __future__ import annotations

import codecs
from typing import Any

from sglang.srt.entrypoints.openai.protocol import CompletionLogprobs
from sglang.srt.managers.detokenizer_manager import WindowTextStream
from sglang.srt.managers.io_struct import LogprobEntry
from sglang.srt.utils.hf_tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# How far after its expected place the text of a prompt's token is searched for.
_MAX_GAP = 8


def token_name(tokenizer: Tokenizer, token_id: int, text: str | None) -> str:
    """The text of a token, or ``bytes:\\xNN...`` as OpenAI writes it if its bytes are not whole characters."""
    if not tokenizer.is_byte_level:
        return text or ""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def named_row(tokenizer: Tokenizer, sampled: LogprobEntry, top: list[LogprobEntry]) -> dict[str, float | None]:
    """Best tokens and the sampled token by name, best first. Of several ids with one name, all but one are named
    ``token_id:N``.

    The sampled token keeps its name, so that the entry of ``tokens`` is found here.
    """
    sampled_name = token_name(tokenizer, sampled[1], sampled[2])
    row: dict[str, float | None] = {}
    for logprob, token_id, text in top:
        if token_id == sampled[1]:
            row[sampled_name] = logprob
            continue
        name = token_name(tokenizer, token_id, text)
        row[f"token_id:{token_id}" if name == sampled_name or name in row else name] = logprob
    row.setdefault(sampled_name, sampled[0])
    return row


class TokenPlaces:
    """Where each token of a text begins, in characters; a token inside a character begins where the character does."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._hidden = tokenizer.all_special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._window = WindowTextStream(tokenizer, skip_special_tokens)
        # Characters of the tokens so far, without one that is not complete.
        self._num_chars = 0

    def push(self, token_id: int, text: str | None) -> int:
        before = self._num_chars
        if token_id in self._hidden:
            return before
        if not self._tokenizer.is_byte_level:
            delta = self._window.push([token_id], final=False)
            self._num_chars += len(delta)
            return before + max(0, delta.find(text or ""))
        data = self._tokenizer.token_bytes(token_id)
        if not data:
            return before
        # The token's first byte is in the character that waits for more bytes, if one does, else in the last one.
        self._num_chars += len(self._utf8.decode(data[:1]))
        place = self._num_chars if self._utf8.getstate()[0] else self._num_chars - 1
        self._num_chars += len(self._utf8.decode(data[1:]))
        return place


def prompt_places(tokenizer: Tokenizer, prompt: str, entries: list[LogprobEntry]) -> list[int]:
    """Where the tokens of a prompt begin in ``prompt``, the text that the client sent; what was added is nowhere."""
    places, position = [], 0
    if tokenizer.is_byte_level:
        data = prompt.encode("utf-8")
        # Characters that begin at or before each byte; the end counts as one.
        starts = [0]
        for byte in data:
            starts.append(starts[-1] + (byte & 0xC0 != 0x80))
        for _, token_id, _ in entries:
            piece = tokenizer.token_bytes(token_id)
            # A special token may have been added; any other may differ from the text by what a normalizer does.
            gap = 0 if token_id in tokenizer.all_special_ids else _MAX_GAP
            found = data.find(piece, position, position + len(piece) + gap) if piece else -1
            begin = position if found < 0 else found
            places.append(starts[begin + 1] - 1 if begin < len(data) else len(prompt))
            position = begin + (len(piece) if found >= 0 else 0)
        return places
    for _, _, text in entries:
        piece_text = text or _REPLACEMENT
        place = -1
        if _REPLACEMENT not in piece_text:
            place = prompt.find(piece_text, position, position + len(piece_text) + _MAX_GAP)
        places.append(position if place < 0 else place)
        position = position if place < 0 else place + len(piece_text)
    return places


class ChoiceLogprobs:
    """The log-probabilities of one choice whose text has not been returned yet.

    A stop string holds text back and may cut it off: a token is reported with the text in which it is, and at the
    end no place is after the text.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, with_top: bool):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._with_top = with_top
        self._places = TokenPlaces(tokenizer, skip_special_tokens)
        self._start = 0
        self._sent = 0
        self._waiting: list[tuple[str, float | None, dict[str, float | None] | None, int]] = []

    def add_prompt(self, prompt: str, was_text: bool, meta: dict[str, Any]) -> None:
        """The tokens of an echoed prompt, before any of the output."""
        entries: list[LogprobEntry] = meta["input_token_logprobs"]
        if was_text:
            places = prompt_places(self._tokenizer, prompt, entries)
        else:
            lone = TokenPlaces(self._tokenizer, self._skip_special_tokens)
            places = [lone.push(token_id, text) for _, token_id, text in entries]
        self._add(entries, meta.get("input_top_logprobs"), places)
        self._start = len(prompt)

    def add_output(self, meta: dict[str, Any]) -> None:
        entries: list[LogprobEntry] = meta["output_token_logprobs"]
        places = [self._start + self._places.push(token_id, text) for _, token_id, text in entries]
        self._add(entries, meta.get("output_top_logprobs"), places)

    def release(self, num_chars: int, final: bool) -> CompletionLogprobs:
        """What is in the text that the client has once it has ``num_chars`` more; everything, if ``final``."""
        self._sent += num_chars
        count = 0
        while count < len(self._waiting) and (final or self._waiting[count][3] < self._sent):
            count += 1
        ready, self._waiting = self._waiting[:count], self._waiting[count:]
        return CompletionLogprobs(
            tokens=[name for name, _, _, _ in ready],
            token_logprobs=[logprob for _, logprob, _, _ in ready],
            top_logprobs=[row for _, _, row, _ in ready] if self._with_top else None,
            text_offset=[min(place, self._sent) for _, _, _, place in ready],
        )

    def _add(self, entries: list[LogprobEntry], tops: list[Any] | None, places: list[int]) -> None:
        for i, (entry, place) in enumerate(zip(entries, places, strict=True)):
            top = tops[i] if tops else None
            row = named_row(self._tokenizer, entry, top) if self._with_top and top is not None else None
            self._waiting.append((token_name(self._tokenizer, entry[1], entry[2]), entry[0], row, place))

"""Grammars by llguidance: converts constraints of clients to grammars, and grammars to masks of the tokens that may
come next."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import llguidance
import msgspec
import numpy as np
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

if TYPE_CHECKING:  # the process that tries grammars has no use for it
    import torch

# A rule of GBNF; Lark has a colon there.
_GBNF = re.compile(r"^\s*[\w-]+\s*::=", re.MULTILINE)

# States of a lexer, of one or two kilobytes each, that a compiled grammar may grow to while it is used.
_MAX_LEXER_STATES = 50_000


class GrammarError(ValueError):
    """A grammar that is invalid, too large, or that no output can satisfy."""


def grammar_of(kind: str, source: str, json_options: dict[str, Any]) -> str:
    """The grammar, as text for ``GuidanceBackend.compile``, of a sampling parameter ``kind`` with value ``source``.

    ``json_options`` are llguidance's, for JSON schemas that do not set them. Raises GrammarError.
    """
    try:
        return _MAKERS[kind](source, json_options)
    except RecursionError:
        raise GrammarError("it is nested too deep") from None
    except Exception as error:  # the library's errors have no common class
        raise GrammarError(str(error)) from None


def _of_ebnf(source: str, _: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_lark(gbnf_to_lark(source) if _GBNF.search(source) else source)


class _Structure(msgspec.Struct):
    begin: str
    end: str
    schema: dict[str, Any] | str | None = None


class _StructuralTag(msgspec.Struct):
    """Text in which ``begin`` of a structure, where it starts with a trigger, is followed by its JSON and ``end``."""

    triggers: list[str]
    structures: list[_Structure]


def _of_structural_tag(source: str, options: dict[str, Any]) -> str:
    tag = msgspec.json.decode(source, type=_StructuralTag)
    tags = []
    for number, structure in enumerate(tag.structures):
        begin = structure.begin
        trigger = next((text for text in tag.triggers if text and begin.startswith(text)), None)
        if trigger is None:
            raise GrammarError(f"structures[{number}].begin does not start with any of the triggers")
        schema = structure.schema or {}
        if isinstance(schema, dict):
            schema = {"x-guidance": options, **schema}
        tags.append(llguidance.StructTag(trigger=trigger, begin=begin, grammar=schema, end=structure.end))
    if not tags:
        raise GrammarError("structures is empty")
    return llguidance.StructTag.to_grammar(tags, assume_special=False)


# By the sampling parameter that holds the source.
_MAKERS: dict[str, Callable[[str, dict[str, Any]], str]] = {
    "json_schema": lambda source, options: LLMatcher.grammar_from_json_schema(source, defaults=cast(Any, options)),
    "regex": lambda source, _: LLMatcher.grammar_from_regex(source),
    "ebnf": _of_ebnf,
    "structural_tag": _of_structural_tag,
}


class GuidanceBackend:
    """Compiles grammars for one tokenizer.

    ``tokenizer_json`` is the text of its tokenizer.json, ``vocab_size`` the model's, whose ids past the tokenizer's are
    never allowed; ``eos_token_ids`` are allowed where the output may end. Raises GrammarError.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=[*eos_token_ids])
        except Exception as error:
            raise GrammarError(f"llguidance cannot use this tokenizer: {error}") from None
        self._limits = llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        # By default the library uses four fifths of the cores, rounded down: one of two, which makes masks serially.
        cores = len(os.sched_getaffinity(0))
        self._executor = llguidance.LLExecutor(num_threads=cores if cores < 5 else None)
        self.num_words = -(-vocab_size // 32)
        # Bits of the tokens that are not text, including the end of the sequence.
        self._special: np.ndarray = np.zeros(self.num_words, np.uint32)
        for i in filter(self._tokenizer.is_special_token, range(vocab_size)):
            self._special[i >> 5] |= np.uint32(1 << (i & 31))
        self._vocab_size = vocab_size

    def compile(self, grammar: str) -> GuidanceGrammar:
        """The compiled grammar, at its start. Raises GrammarError. Other threads run meanwhile."""
        try:
            matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        except BaseException as error:  # a panic in the library is no Exception
            raise GrammarError(f"{type(error).__name__}: {error}") from None
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(matcher.get_error().partition("\n<state>")[0])
        return GuidanceGrammar(matcher)

    def fill(self, rows: Sequence[tuple[GuidanceGrammar, int]], mask: torch.Tensor) -> None:
        """The tokens that each grammar allows, into ``mask`` [B, ``num_words``] int32: bit t % 32 of word t // 32."""
        asked = [(grammar.matcher, row) for grammar, row in rows if not grammar.is_waiting]
        if asked:
            self._executor.unsafe_compute_mask_ptr(asked, mask.data_ptr(), mask.shape[1] * 4, mask.shape[0])
            words = mask.numpy().view(np.uint32)
            for matcher, row in asked:
                self._spell_as_text(matcher, words[row])

    def fill_along(
        self, rows: Sequence[tuple[GuidanceGrammar, int]], drafts: Sequence[Sequence[int]], mask: torch.Tensor
    ) -> None:
        """``fill`` along the drafts of each grammar: row + j is for the token after the first j of them.

        Rows after a draft that the grammar forbids, or with which it is complete, give no token and stay as they are.
        """
        places = [grammar.place for grammar, _ in rows]
        words = mask.numpy().view(np.uint32)
        going = list(zip(rows, drafts, strict=True))
        number = 0
        while going:
            self.fill([(grammar, row + number) for (grammar, row), _ in going], mask)
            following = [entry for entry in going if number < len(entry[1])]
            going = []
            for (grammar, row), path in following:
                token_id = path[number]
                if not words[row + number, token_id >> 5] >> np.uint32(token_id & 31) & 1:
                    continue
                grammar.take(token_id)
                if not (grammar.is_complete or grammar.error):
                    going.append(((grammar, row), path))
            number += 1
        for (grammar, _), place in zip(rows, places, strict=True):
            grammar.return_to(place)

    def _spell_as_text(self, matcher: LLMatcher, words: np.ndarray) -> None:
        """Repair a mask [words] uint32 of forced text, of which llguidance may allow one token that it then forbids.

        It has the tokenizer spell such text, which says ``<think>`` by a special token, and takes that for no text.
        """
        special = words & self._special
        if not special.any():
            return
        found = np.unpackbits(special.view(np.uint8), bitorder="little").nonzero()[0].tolist()
        bad = [i for i in found if not (matcher.is_stopped() or matcher.validate_tokens([i]))]
        for i in bad:
            words[i >> 5] &= ~np.uint32(1 << (i & 31))
        if not bad or words.any():
            return
        forced = matcher.compute_ff_bytes()
        ids = [self._text_ids.get(forced[:length]) for length in range(1, len(forced) + 1)]
        for i in ids:
            if i is not None:
                words[i >> 5] |= np.uint32(1 << (i & 31))

    @cached_property
    def _text_ids(self) -> dict[bytes, int]:
        """Tokens by their text, without the special ones."""
        tokenizer = self._tokenizer
        ids = [i for i in range(self._vocab_size) if not tokenizer.is_special_token(i)]
        return {tokenizer.decode_bytes([i]): i for i in reversed(ids)}


class GuidanceGrammar:
    """A compiled grammar and its place in one output; with ``after``, output up to that token is free."""

    def __init__(self, matcher: LLMatcher, after: int | None = None) -> None:
        self.matcher = matcher
        self._after = after
        self._num_seen = 0
        self._num_taken = 0  # by the matcher
        self.spent_s = 0.0  # in ``follow``
        self.is_waiting = after is not None

    def copy(self, after: int | None) -> GuidanceGrammar:
        return GuidanceGrammar(self.matcher.deep_copy(), after)

    def follow(self, output_ids: Sequence[int]) -> None:
        """Advance by the new part of the output, which continues that of the last call."""
        began = time.perf_counter()
        for token_id in output_ids[self._num_seen :]:
            self.take(token_id)
        self._num_seen = len(output_ids)
        self.spent_s += time.perf_counter() - began

    def take(self, token_id: int) -> None:
        """Advance by one token."""
        if self.is_waiting:
            self.is_waiting = token_id != self._after
        else:
            self.matcher.consume_token(token_id)
            self._num_taken += 1

    @property
    def place(self) -> tuple[bool, int]:
        """The state, for ``return_to``."""
        return self.is_waiting, self._num_taken

    def return_to(self, place: tuple[bool, int]) -> None:
        """Undo all calls of ``take`` since that state."""
        self.is_waiting, num_taken = place
        self.matcher.rollback(self._num_taken - num_taken)
        self._num_taken = num_taken

    @property
    def is_complete(self) -> bool:
        """Whether only the end may follow."""
        return not self.is_waiting and self.matcher.is_stopped()

    @property
    def error(self) -> str:
        """Why it failed; "" while it is valid."""
        return self.matcher.get_error().partition("\n")[0]

"""A Hugging Face tokenizer folder read with the ``tokenizers`` library alone."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers

from sglang.srt.utils.chat_template import (
    ChatTemplate,
    ChatTemplateError,
    PromptTemplate,
    find_chat_template,
    load_chat_template_file,
)
from sglang.srt.utils.common import read_json_object
from sglang.srt.utils.deepseek_template import find_deepseek_template
from sglang.srt.utils.limits import MAX_TOKENIZER_GROWTH, MAX_TOKENIZER_JSON_BYTES

logger = logging.getLogger(__name__)

_ADDED_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Long runs, which expressions that never end take worst.
_TRIAL_TEXT = " ".join(char * 512 for char in "x1 \n-") + " Ab'c, d."
# The end of the text, of a chat turn, and of a message that waits for a tool.
_END_TOKENS = ("eos_token", "eot_token", "eom_token")

# From here on it is worth letting other threads run, which only the batch call does.
_LONG_DECODE = 4096


class TokenizerError(ValueError):
    """The tokenizer folder lacks a file or holds one that cannot be read."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character of each byte, inverted: 188 bytes stand for themselves, the rest move to 256+."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(kept)]
    return {chr(b): b for b in kept} | {chr(256 + i): b for i, b in enumerate(moved)}


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, TokenizerError) if path.is_file() else {}


def _token_text(value: Any) -> str | None:
    """Content of a special token given as text or as a serialised AddedToken."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


class Tokenizer:
    """Text to ids and back, and the chat template; ``eos_token_ids``: every token that its files call an end."""

    def __init__(
        self, backend: tokenizers.Tokenizer, folder: Path, chat_template: str | None = None, with_template: bool = True
    ):
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.config = _read_json(folder / "tokenizer_config.json")
        self.special_tokens = self._read_special_tokens(folder)
        self._add_configured_tokens()
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        added = backend.get_added_tokens_decoder()
        self.all_special_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        ends = [self._special_id(name) for name in _END_TOKENS]
        if self.eos_token_id is None and "eos_token" in self.special_tokens:
            text = self.special_tokens["eos_token"]
            logger.warning("eos_token %r of %s is not in the vocabulary: it cannot end a turn", text[:100], folder)
        self.eos_token_ids = tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None))
        self._prepend_bos = self._needs_bos()
        document = json.loads(backend.to_str())
        _refuse_growth(document)
        self.is_byte_level = _is_byte_level(document)
        self.encode(_TRIAL_TEXT)
        self._bytes_of_char = _byte_alphabet()
        self.token_bytes = functools.cache(self._token_bytes)
        self.chat_template: PromptTemplate | None = None
        if with_template:
            given = load_chat_template_file(chat_template) if chat_template else None
            source = given or find_chat_template(folder, self.config)
            if source:
                self.chat_template = ChatTemplate(source, self.special_tokens)
            else:
                self.chat_template = find_deepseek_template(folder, lambda text: self.token_id(text) is not None)

    @classmethod
    def from_path(cls, path: str, chat_template: str | None = None, with_template: bool = True) -> Tokenizer:
        """Read a folder or tokenizer.json, templates unless ``with_template`` is False. Raises TokenizerError."""
        given = Path(path)
        file = given / "tokenizer.json" if given.is_dir() else given
        if not file.is_file():
            raise TokenizerError(
                f"No tokenizer.json at {path!r}. Give a local folder that contains one with --tokenizer-path, or "
                "--skip-tokenizer-init to serve token ids only."
            )
        size = file.stat().st_size
        if size > MAX_TOKENIZER_JSON_BYTES:
            raise TokenizerError(f"{file} has {size} bytes; at most {MAX_TOKENIZER_JSON_BYTES} are read.")
        try:
            with _panics_as_errors():
                backend = tokenizers.Tokenizer.from_file(str(file))
                return cls(backend, file.parent, chat_template, with_template)
        except (TokenizerError, ChatTemplateError):
            raise
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(f"{file} cannot be read as a tokenizer: {error}") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``, with special tokens by default; the batch call lets other threads run."""
        with _panics_as_errors():
            ids = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        if add_special_tokens and self._prepend_bos and self.bos_token_id is not None:
            ids.insert(0, self.bos_token_id)
        return ids

    def to_json(self) -> str:
        """The text of a tokenizer.json of this tokenizer, tokens of tokenizer_config.json included."""
        return self._backend.to_str()

    def token_id(self, text: str) -> int | None:
        """The token whose text is ``text``, or None."""
        return self._backend.token_to_id(text)

    def count_tokens(self, text: str) -> int:
        """Tokens of ``text`` without special tokens around it; other threads run meanwhile."""
        with _panics_as_errors():
            return len(self._backend.encode_batch_fast([text], add_special_tokens=False)[0])

    @functools.cached_property
    def max_token_chars(self) -> int:
        """Characters of the longest token: a text of more than k times as many has more than k tokens."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)))

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``, unknown ones as nothing; spaces stay, as streamed text cannot be taken back."""
        if len(ids) > _LONG_DECODE:
            return self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def _token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token of a byte-level tokenizer contributes to the text."""
        token = self._backend.id_to_token(token_id) or ""
        try:
            return bytes(self._bytes_of_char[char] for char in token)
        except KeyError:
            return token.encode("utf-8")

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """Prompt text of a conversation; ``options`` are those of ``PromptTemplate.render``."""
        if self.chat_template is None:
            raise ChatTemplateError(
                "This checkpoint has no chat template, so chat requests cannot be turned into a prompt. Start the "
                "server with --chat-template FILE, or use /v1/completions."
            )
        return self.chat_template.render(messages, **options)

    def _read_special_tokens(self, folder: Path) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for source in (_read_json(folder / "special_tokens_map.json"), self.config):
            for key, value in source.items():
                text = _token_text(value)
                if key.endswith("_token") and text is not None:
                    merged[key] = text
            named = source.get("extra_special_tokens")
            for key, value in named.items() if isinstance(named, dict) else ():
                text = _token_text(value)
                if text is not None:
                    merged.setdefault(key, text)
            for key in ("additional_special_tokens", "extra_special_tokens"):
                if isinstance(source.get(key), list):
                    merged[key] = [text for text in map(_token_text, source[key]) if text is not None]
        return merged

    def _add_configured_tokens(self) -> None:
        """Add tokens that only tokenizer_config.json declares, at the ids that it gives."""
        declared = self.config.get("added_tokens_decoder") or {}
        if not isinstance(declared, dict):
            raise TokenizerError(
                f"tokenizer_config.json: key added_tokens_decoder must be an object, {declared!r:.100}"
            )
        for token_id, fields in declared.items():
            named = token_id.isascii() and token_id.isdigit() and len(token_id) < 10
            if not named or not isinstance(fields, dict) or not isinstance(fields.get("content"), str):
                raise TokenizerError(
                    f"tokenizer_config.json: added_tokens_decoder[{token_id!r:.20}] must map a token id to an object "
                    f"with a content, found {fields!r:.100}"
                )
        for token_id, fields in sorted(declared.items(), key=lambda item: int(item[0])):
            if self._backend.token_to_id(fields["content"]) is not None:
                continue
            options = {key: fields[key] for key in _ADDED_TOKEN_FLAGS if isinstance(fields.get(key), bool)}
            self._backend.add_tokens([tokenizers.AddedToken(fields["content"], **options)])
            got = self._backend.token_to_id(fields["content"])
            if got != int(token_id):
                raise TokenizerError(
                    f"tokenizer_config.json gives token {fields['content']!r} the id {token_id}, but the vocabulary "
                    f"of tokenizer.json puts it at {got}: the two files do not belong together."
                )

    def _special_id(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    def _needs_bos(self) -> bool:
        """Whether ``add_bos_token`` asks for a BOS token that the post-processor does not add."""
        if not self.config.get("add_bos_token") or self.bos_token_id is None:
            return False
        return self._backend.encode("", add_special_tokens=True).ids[:1] != [self.bos_token_id]


def _is_byte_level(document: dict[str, Any]) -> bool:
    """Whether decoding is the concatenation of each token's bytes, read as UTF-8."""
    decoder = document.get("decoder") or {}
    chain = decoder.get("decoders", []) if decoder.get("type") == "Sequence" else [decoder]
    return len(chain) == 1 and chain[0].get("type") == "ByteLevel"


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """The library's panics, which are no Exception (a regular expression without end, say), become TokenizerError."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise TokenizerError(f"The tokenizer failed on a text: {error}") from None


def _refuse_growth(document: dict[str, Any]) -> None:
    """Raise TokenizerError for rules that could make a text thousands of times longer."""
    for key in ("normalizer", "decoder"):
        growth = _growth(document.get(key) or {})
        if growth > MAX_TOKENIZER_GROWTH:
            raise TokenizerError(
                f"tokenizer.json: the {key} may make a text {growth:.3g} times as long; at most "
                f"{MAX_TOKENIZER_GROWTH} times is allowed."
            )


def _growth(rule: dict[str, Any]) -> float:
    """How many times as long a rule may make a text."""
    steps = [*rule.get("normalizers", ()), *rule.get("decoders", ())]
    if steps:
        return math.prod(map(_growth, steps))
    pattern = rule.get("pattern") or {}
    content = rule.get("content") or rule.get("prepend") or rule.get("replacement") or ""
    if pattern.get("String"):
        return max(1.0, len(content) / len(pattern["String"]))
    if rule.get("type") in ("NFKC", "NFKD"):
        return 18.0  # Unicode's longest compatibility decomposition
    return 1.0 + len(content)  # an expression may match each character, or between all

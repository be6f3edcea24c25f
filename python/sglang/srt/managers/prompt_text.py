"""From text to token ids and back, in bounded time and memory, outside the event loop."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from sglang.srt.managers.request_input import RequestError, too_long
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.srt.utils.limits import MAX_LONG_TEXTS_AT_ONCE

# Longer texts are tokenized in a thread, so that other requests continue meanwhile.
_LONG_TEXT_CHARS = 8192
_PIECE_CHARS = 1 << 16
# A text of at most so many bytes for each token of the context is tokenized as a whole, whatever its number of tokens.
_BYTES_PER_TOKEN = 4


class PromptEncoder:
    """Tokenizes for one model. Refuses text that cannot fit into the context before tokenizing it."""

    def __init__(self, tokenizer: Tokenizer, context_len: int, vocab_size: int):
        self._tokenizer = tokenizer
        self._context_len = context_len
        self._vocab_size = vocab_size
        self._max_chars = context_len * tokenizer.max_token_chars
        self._threads = ThreadPoolExecutor(MAX_LONG_TEXTS_AT_ONCE, "tokenize")

    def close(self) -> None:
        """Cancel work that waits for a thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Raises RequestError if it is too long, no Unicode, or has unknown ids."""
        if len(text) > self._max_chars:
            raise too_long(
                f"The text has {len(text)} characters. The model's context length is {self._context_len} tokens of at "
                f"most {self._tokenizer.max_token_chars} characters: send at most {self._max_chars} characters."
            )
        if len(text) < _LONG_TEXT_CHARS:
            ids = self._encode(text, add_special_tokens)
            await asyncio.sleep(0)  # a batch of many must not hold up the other requests
        else:
            loop = asyncio.get_running_loop()
            ids = await loop.run_in_executor(self._threads, self._encode, text, add_special_tokens)
        if ids and max(ids) >= self._vocab_size:
            raise RequestError(
                f"The tokenizer produced id {max(ids)}, but the model has a vocabulary of {self._vocab_size}: the "
                "tokenizer does not belong to this model."
            )
        return ids

    async def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``, which are inside the vocabulary."""
        if len(ids) < _LONG_TEXT_CHARS:
            text = self._tokenizer.decode(ids, skip_special_tokens)
            await asyncio.sleep(0)  # as above
            return text
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._tokenizer.decode, ids, skip_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            num_bytes = len(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise RequestError(f"The prompt is not valid Unicode: {error.reason} at position {error.start}.") from None
        if num_bytes > _BYTES_PER_TOKEN * self._context_len:
            self._refuse_far_too_long(text)
        return self._tokenizer.encode(text, add_special_tokens)

    def _refuse_far_too_long(self, text: str) -> None:
        """Count tokens piece by piece: the whole text could have millions, of 130 bytes each.

        A cut adds at most a few tokens to a piece of thousands of characters; twice the context is far beyond that.
        """
        most, count = 2 * self._context_len, 0
        for start in range(0, len(text), _PIECE_CHARS):
            count += self._tokenizer.count_tokens(text[start : start + _PIECE_CHARS])
            if count > most:
                raise too_long(
                    f"The text ({len(text)} characters) has more than {most} tokens. The model's context length is "
                    f"{self._context_len} tokens."
                )

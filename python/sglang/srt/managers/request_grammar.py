"""The output constraint of a request, as a grammar that was checked before the scheduler compiles it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sglang.srt.constrained.grammar_checker import CheckerError, GrammarChecker
from sglang.srt.constrained.llguidance_backend import GrammarError
from sglang.srt.managers.request_input import RequestError, overloaded
from sglang.srt.parser.reasoning_parser import THINK_END
from sglang.srt.parser.tool_call_parser import JSON_WHITE_SPACE
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.srt.utils.limits import MAX_GRAMMARS_CACHED

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

_RETRY_AFTER_S = 5
# A grammar, or why there is none.
Verdict = tuple[str, None] | tuple[None, str]


class RequestGrammars:
    """Checks grammars one at a time, outside the event loop, and remembers the results of the last ones."""

    def __init__(self, args: ServerArgs, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._refusal = grammar_refusal(args)
        self._tokenizer = tokenizer
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._checker: GrammarChecker | None = None
        if tokenizer is not None and self._refusal is None:
            self._checker = GrammarChecker(tokenizer.to_json, vocab_size, json_options(args))
        self._verdict = lru_cache(MAX_GRAMMARS_CACHED)(self._check)

    def check_served(self, params: SamplingParams) -> None:
        """Raise RequestError if ``params`` constrain the output and this server does not support that."""
        if params.grammar_source is not None and self._refusal is not None:
            raise RequestError(f"{params.grammar_source[0]} is not supported by this server: {self._refusal}")

    async def grammar(self, params: SamplingParams) -> str | None:
        """The grammar that ``params``, which have passed ``check_served``, ask for. Raises RequestError."""
        if params.grammar_source is None:
            return None
        kind, source = params.grammar_source
        loop = asyncio.get_running_loop()
        try:
            grammar, error = await loop.run_in_executor(self._thread, self._verdict, kind, source)
        except CheckerError as failure:  # not remembered
            raise overloaded(f"{kind} cannot be checked now: {failure}.", _RETRY_AFTER_S) from None
        if grammar is None:
            raise RequestError(f"{kind} cannot be used: {error}", param=kind)
        return grammar

    def think_end_id(self) -> int:
        """The token that ends a thought. Raises RequestError if the tokenizer has no single token for it."""
        token_id = None if self._tokenizer is None else self._tokenizer.token_id(THINK_END)
        if token_id is None:
            raise RequestError(
                f"Constraining the answer after a thought needs {THINK_END} to be a token of this model. Turn "
                "thinking off in this request."
            )
        return token_id

    def close(self) -> None:
        """End the process that checks grammars."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._checker is not None:
            self._checker.close()

    def _check(self, kind: str, source: str) -> Verdict:
        assert self._checker is not None
        try:
            return self._checker.check(kind, source), None
        except GrammarError as error:
            return None, str(error)


def grammar_refusal(args: ServerArgs) -> str | None:
    """Why a server of the resolved ``args`` does not support constrained output; None if it does."""
    if args.grammar_backend == "none":
        return "it was started with --grammar-backend none. Remove the field."
    if args.skip_tokenizer_init:
        return "it runs with --skip-tokenizer-init, and grammars are about text. Remove the field."
    return None


def json_options(args: ServerArgs) -> dict[str, Any]:
    """llguidance's options for white space in JSON."""
    if args.constrained_json_disable_any_whitespace:
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": args.constrained_json_whitespace_pattern or JSON_WHITE_SPACE}

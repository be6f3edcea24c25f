"""Grammars in the scheduler: compiled in another thread, and turned into masks of the tokens that rows may sample."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import torch

from sglang.srt.constrained.llguidance_backend import GrammarError, GuidanceBackend, GuidanceGrammar
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

# Number of grammars that are cached for later requests.
MAX_COMPILED = 16
# A constraint that took more seconds in all is slow: others take some 20 microseconds per token.
SLOW_S = 1.0

logger = logging.getLogger(__name__)


class GrammarManager:
    """Holds requests until their grammar is compiled, and then makes the masks of their rows.

    ``backend`` as text states why there is none. ``announce`` is called, by one other thread, with the
    id of a request whose grammar is compiled; the id must then reach ``take`` of all ranks in the same turn. Where it
    is None, a grammar is compiled within ``hold``.
    """

    def __init__(
        self,
        backend: GuidanceBackend | str = "there is no grammar backend",
        announce: Callable[[str], None] | None = None,
    ) -> None:
        self._backend = backend
        self._announce = announce
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._compiled = lru_cache(MAX_COMPILED)(self._compile)
        self._awaited: dict[str, Future[GuidanceGrammar]] = {}
        self.pending: list[Req] = []

    def hold(self, req: Req) -> bool:
        """True if the request must wait for ``take``; otherwise it has its grammar, or the reason why it has none."""
        if req.grammar_text is None:
            return False
        if isinstance(self._backend, str):
            req.grammar_error = self._backend
            return False
        future = self._compiled(req.grammar_text)
        if self._announce is None:
            self._give(req, future)
            return False
        self.pending.append(req)
        self._awaited[req.rid] = future
        # By the compiling thread, so that it follows the grammar and comes from only one thread.
        self._thread.submit(self._announce, req.rid)
        return True

    def take(self, rid: str) -> Req | None:
        """The waiting request with its grammar or its error, None if aborted; waits for this rank's compiler."""
        future = self._awaited.pop(rid)
        req = next((req for req in self.pending if req.rid == rid), None)
        if req is None:
            return None
        self.pending.remove(req)
        self._give(req, future)
        return req

    def mask(
        self, batch: ScheduleBatch, device: torch.device, drafts: Callable[[], list[list[int]]]
    ) -> torch.Tensor | None:
        """Masks of the tokens that each row may sample, [rows, words] int32 on ``device``; None if no row is
        constrained.

        Every token of the requests must be known. Rows without a token, or of ended requests, may sample all.
        ``drafts`` are the drafts of each request if a step has several rows per request: row j follows the
        first j of them.
        """
        formed = [(index, req, req.grammar) for index, req in enumerate(batch.reqs) if req.grammar is not None]
        if not formed:
            return None
        rows = []
        width = batch.kind.rows_per_request if batch.forward_mode.is_decode() else 1
        for index, req, grammar in formed:
            if batch.max_new[index] and req.finish_reason is None:
                grammar.follow(req.output_ids)
                self._tell_if_slow(req, grammar)
                rows.append((grammar, index * width))
        if not rows:
            return None
        assert isinstance(self._backend, GuidanceBackend)
        size = (len(batch.reqs) * width, self._backend.num_words)
        mask = torch.full(size, -1, dtype=torch.int32, pin_memory=device.type == "cuda")
        if width == 1:
            self._backend.fill(rows, mask)
        else:
            told = drafts()
            self._backend.fill_along(rows, [told[row // width] for _, row in rows], mask)
        return mask if device.type == "cpu" else mask.to(device, non_blocking=True)

    @staticmethod
    def _tell_if_slow(req: Req, grammar: GuidanceGrammar) -> None:
        """Log once that all requests of a step wait for one whose constraint is slow."""
        if grammar.spent_s > SLOW_S:
            logger.warning(
                "request %.64r: following its output constraint took %.1f s for %d tokens, and all other requests wait "
                "for it. A grammar is slow if it derives one text in many ways, as `e: e e | X` or `e: e OP e | X`.",
                req.rid, grammar.spent_s, len(req.output_ids),
            )  # fmt: skip
            grammar.spent_s = -math.inf

    def _compile(self, grammar: str) -> Future[GuidanceGrammar]:
        assert isinstance(self._backend, GuidanceBackend)
        return self._thread.submit(self._backend.compile, grammar)

    @staticmethod
    def _give(req: Req, future: Future[GuidanceGrammar]) -> None:
        try:
            req.grammar = future.result().copy(req.grammar_after)
        except GrammarError as error:
            req.grammar_error = str(error)

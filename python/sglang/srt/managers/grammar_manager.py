"""Grammars in the scheduler: compiled in another thread, and turned into masks of the tokens that rows may sample."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sglang.srt.constrained.llguidance_backend import GrammarError, GuidanceBackend, GuidanceGrammar
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

# Grammars that are kept for requests to come.
MAX_COMPILED = 16


class GrammarManager:
    """Holds requests back until their grammar is compiled, and then masks their rows.

    ``backend`` says in words why there is none where it is text. ``announce`` is called, by one other thread, with the
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
        self._compiled: OrderedDict[str, Future[GuidanceGrammar]] = OrderedDict()
        self._awaited: dict[str, Future[GuidanceGrammar]] = {}
        self.pending: list[Req] = []

    def hold(self, req: Req) -> bool:
        """Whether the request must wait for ``take``; where not, it has what it needs, or the reason why not."""
        if req.grammar_text is None:
            return False
        if isinstance(self._backend, str):
            req.grammar_error = self._backend
            return False
        future = self._future(self._backend, req.grammar_text)
        if self._announce is None:
            self._give(req, future)
            return False
        self.pending.append(req)
        self._awaited[req.rid] = future
        # By the thread that compiles, so that it comes behind the grammar, and from one thread alone.
        self._thread.submit(self._announce, req.rid)
        return True

    def take(self, rid: str) -> Req | None:
        """The request that waited, with its grammar or the reason why it has none.

        None where it has been aborted meanwhile. Waits where another rank was faster.
        """
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
        """Tokens that each row of the step may draw, [rows, words] int32 on ``device``; None where all may draw all.

        Every token of the requests is known. Rows that give no token, or whose request has ended, may draw all.
        ``drafts`` gives those of each request where a step has several rows per request: row j stands behind the
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

    def _future(self, backend: GuidanceBackend, grammar: str) -> Future[GuidanceGrammar]:
        future = self._compiled.get(grammar)
        if future is None:
            future = self._compiled[grammar] = self._thread.submit(backend.compile, grammar)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return future

    @staticmethod
    def _give(req: Req, future: Future[GuidanceGrammar]) -> None:
        try:
            req.grammar = future.result().copy(req.grammar_after)
        except GrammarError as error:
            req.grammar_error = str(error)

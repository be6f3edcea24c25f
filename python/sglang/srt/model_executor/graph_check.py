"""Check at start-up that the replay of each graph equals its eager step, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sglang.srt.configs.cache_layout import FULL, STATE, SWA
from sglang.srt.mem_cache.memory_pool import ModelPools
from sglang.srt.mem_cache.written_rows import WrittenRows
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.model_executor.forward_batch_info import DECODE, ModelWorkerBatch, StepKind
from sglang.srt.model_executor.model_pools import RankMemory, StepRelay

# Context lengths of the check, repeated over the batch: odd, one page, more than one split.
CHECK_LENS = (17, 1, 64, 129, 3)


def check_lens(page_size: int | None) -> tuple[int, ...]:
    """Context lengths of the check; with fixed pages (``CacheLayout.page_size``) also past one page, and half a
    page."""
    return CHECK_LENS if page_size is None else (page_size + 4, page_size // 2, *CHECK_LENS)


# Runs a batch with its bucket and returns what the step computed.
Run = Callable[[ModelWorkerBatch, int], Sequence[torch.Tensor]]


class GraphCheck:
    """Compares eager and replayed steps on fixed inputs. Needs empty pools, and leaves them zeroed.

    ``eager(batch, bucket)`` and ``replay`` run the padded step of ``kind``, and return what it computed for the
    requests of the batch. It reads ids, lengths and drafts by request row in ``memory``. writes_table: the step writes
    its slots to the request table; otherwise they must be there.
    """

    def __init__(
        self,
        graphs: BucketGraphs[Any],
        kind: StepKind,
        eager: Run,
        replay: Run,
        memory: RankMemory,
        pools: ModelPools,
        vocab_size: int,
        writes_table: bool = True,
    ) -> None:
        self._graphs = graphs
        self._kind = kind
        self._eager = eager
        self._replay = replay
        self._writes_table = writes_table
        self._last_token = memory.last_token
        self._relay = memory.relay
        self._width, self._ahead = kind.rows_per_request, kind.slots_ahead
        self._req_pool = memory.req_to_token_pool
        self._page_size = pools.page_size
        self._vocab_size = vocab_size
        self._lens = check_lens(pools.layout.page_size)
        self._window = memory.window
        self._held_pages = pools.size(FULL) // pools.page_size
        if self._window is not None:
            self._held_pages = min(self._held_pages, self._window.num_pages)
        self._num_pages = min(self._held_pages, self._wanted_pages())
        self._num_states = min(pools.size(STATE), max(map(self._num_requests, graphs.buckets)))
        num_tokens = self._num_pages * pools.page_size
        self._written = WrittenRows(pools, {FULL: num_tokens, SWA: num_tokens, STATE: self._num_states})

    def run(self) -> None:
        """Check every captured bucket; a bucket that differs on any rank is refused with the reason."""
        try:
            for bucket in (size for size in self._graphs.buckets if size not in self._graphs.refused):
                self._graphs.agree(bucket, self._check(bucket) or "")
        finally:
            self._written.clear()

    def _wanted_pages(self) -> int:
        """Pages that the batch of the largest bucket takes if there are so many."""
        return self._graphs.buckets[-1] * self._pages(max(self._lens) + self._ahead)

    def _num_requests(self, bucket: int) -> int:
        """Requests of the batch for ``bucket``: one fewer than it has room for, so that there is padding."""
        return max(1, bucket - 1)

    def _least_pages(self, bucket: int) -> int:
        """Pages that the batch for ``bucket`` takes at least."""
        return self._num_requests(bucket) * self._pages(self._width + self._ahead)

    def _check(self, bucket: int) -> str | None:
        """None if replay equals eager for a batch that leaves room for padding (bucket 1: none), else why not."""
        size = self._num_requests(bucket)
        rows = [row for row in (self._req_pool.alloc() for _ in range(size)) if row is not None]
        try:
            if len(rows) < size:
                return f"the request table has fewer than {size} rows"
            page, needed = self._page_size, self._least_pages(bucket)
            if self._num_pages < needed:
                have, need = self._num_pages * page, needed * page
                return f"the pools have {have} slots, and the step of {size} requests needs {need}"
            batch = self._batch(rows, bucket, torch.Generator().manual_seed(bucket))
            self._forget_slots(batch)
            self._written.poison(bucket)
            wanted = [tensor.clone() for tensor in self._eager(batch, bucket)]
            written = self._written.fingerprints()
            self._forget_slots(batch)
            self._written.poison(bucket)
            for ours, theirs in zip(wanted, self._replay(batch, bucket), strict=True):
                if not torch.equal(ours, theirs):
                    return f"replayed results differ from eager ones by {float((ours - theirs).abs().max()):.3g}"
                if not bool(ours.isfinite().all()):
                    return "the step's results are not finite"
            if any(not torch.equal(a, b) for a, b in zip(written, self._written.fingerprints(), strict=True)):
                return "the replayed step wrote other keys, values or states than the eager one"
            return None
        finally:
            for row in rows:
                self._req_pool.free(row)
            if self._window is not None:
                self._window.clear()

    def _forget_slots(self, batch: ModelWorkerBatch) -> None:
        """Remove the slots of the step from the request table, so that the step itself must write them."""
        if not self._writes_table:
            return
        none = torch.zeros(self._width + self._ahead, dtype=torch.int64)
        for row, end in zip(batch.req_pool_indices.tolist(), batch.seq_lens, strict=True):
            self._req_pool.write(row, end - self._width, none)

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_size)

    def _lend(self, rows: list[int], lens: Sequence[int], generator: torch.Generator) -> list[torch.Tensor]:
        """Write scattered slots for so many tokens of each request into the table; the slots."""
        order = torch.randperm(self._num_pages, generator=generator) + 1
        if self._window is not None:
            self._window.lend(order.flip(0).tolist())
            self._window.flush()
        slots, used = [], 0
        for row, length in zip(rows, lens, strict=True):
            count = self._pages(length)
            pages = order[used : used + count].unsqueeze(1) * self._page_size
            slots.append((pages + torch.arange(self._page_size)).flatten()[:length])
            used += count
            self._req_pool.write(row, 0, slots[-1])
        return slots

    def _states(self, count: int, generator: torch.Generator) -> list[int] | None:
        if not self._num_states:
            return None
        return (torch.randperm(self._num_states, generator=generator)[:count] + 1).tolist()

    def _batch(self, rows: list[int], bucket: int, generator: torch.Generator) -> ModelWorkerBatch:
        """A batch with contexts of several lengths."""
        # The request table has a column past the context; the RoPE table has no row for it.
        room = self._num_pages // len(rows) * self._page_size
        longest = min(max(self._lens), self._req_pool.max_context_len - 1, room) - self._ahead
        lens = [max(self._width, min(self._lens[i % len(self._lens)], longest)) for i in range(len(rows))]
        slots = self._lend(rows, [length + self._ahead for length in lens], generator)
        new = torch.cat([mine[length - self._width :] for mine, length in zip(slots, lens, strict=True)])
        ids = torch.randint(0, self._vocab_size, (len(rows),), generator=generator)
        self._last_token[rows] = ids.to(self._last_token.device)
        if self._relay is not None:
            self._fill_relay(self._relay, rows, lens, generator)
        return ModelWorkerBatch.uniform(self._kind, rows, lens, new, self._states(len(rows), generator))

    def _fill_relay(self, relay: StepRelay, rows: list[int], lens: Sequence[int], generator: torch.Generator) -> None:
        """Random drafts, and lengths, of which those of every other request are one below the host's bound."""
        committed = [max(0, length - self._width - (i + 1) % 2) for i, length in enumerate(lens)]
        relay.committed[rows] = torch.tensor(committed, device=relay.committed.device)
        drafts = torch.randint(0, self._vocab_size, (len(rows), relay.drafts.shape[1]), generator=generator)
        relay.drafts[rows] = drafts.to(relay.drafts.device)


class ExtendCheck(GraphCheck):
    """The same for extend steps, whose buckets are numbers of tokens: several requests after prefixes."""

    # Cached and new tokens of each; the last takes what is left of the bucket.
    SPANS = ((0, 17), (33, 3), (64, 129), (129, 64), (0, 1))

    def __init__(
        self, graphs: BucketGraphs[Any], eager: Run, replay: Run, memory: RankMemory, pools: ModelPools, vocab_size: int
    ) -> None:
        super().__init__(graphs, DECODE, eager, replay, memory, pools, vocab_size, writes_table=False)

    def _spans(self, bucket: int) -> list[tuple[int, int]]:
        """Cached and new tokens of each request, which leave at least one row of padding (bucket 1: none)."""
        # The request table has a column past the context; the RoPE table has no row for it.
        left, longest = max(1, bucket - 1), self._req_pool.max_context_len - 1
        spans: list[tuple[int, int]] = []
        for cached, new in self.SPANS[: self._req_pool.size]:
            if left:
                cached = min(cached, longest // 2)
                spans.append((cached, min(new, longest - cached, left)))
                left -= spans[-1][1]
        cached, new = spans[-1]
        spans[-1] = (cached, min(new + left, longest - cached))
        if sum(self._pages(sum(span)) for span in spans) > self._held_pages:
            # A pool so small is full with one request.
            spans = [(0, min(max(1, bucket - 1), longest, self._held_pages * self._page_size))]
        return spans

    def _wanted_pages(self) -> int:
        return max(map(self._least_pages, self._graphs.buckets))

    def _num_requests(self, bucket: int) -> int:
        return len(self._spans(bucket))

    def _least_pages(self, bucket: int) -> int:
        return sum(self._pages(sum(span)) for span in self._spans(bucket))

    def _batch(self, rows: list[int], bucket: int, generator: torch.Generator) -> ModelWorkerBatch:
        spans = self._spans(bucket)
        cached, ends = [span[0] for span in spans], [sum(span) for span in spans]
        slots = self._lend(rows, ends, generator)
        new = torch.cat([mine[start:] for mine, start in zip(slots, cached, strict=True)])
        ids = torch.randint(0, self._vocab_size, new.shape, generator=generator)
        return ModelWorkerBatch.extend(rows, cached, ends, ids, new, self._states(len(rows), generator))

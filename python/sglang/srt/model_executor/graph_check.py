"""Start-up proof that replaying a graph equals running its step eagerly, bucket by bucket, bit by bit."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sglang.srt.configs.cache_layout import FULL, STATE
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.memory_pool import ModelPools
from sglang.srt.mem_cache.written_rows import WrittenRows
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch
from sglang.srt.model_executor.step_graphs import GraphOutput, StepGraphs

# Context lengths of the check, repeated over the batch: odd, one page, more than one split.
CHECK_LENS = (1, 17, 64, 129, 3)


class GraphCheck:
    """Compares eager and replayed steps on fixed inputs; it runs while the pools are empty, and leaves them zeroed.

    ``eager(batch, bucket)`` runs the padded step without the graph. last_token: where a step finds the ids that its
    requests drew last, by request row.
    """

    def __init__(
        self,
        graphs: StepGraphs,
        eager: Callable[[ModelWorkerBatch, int], GraphOutput],
        last_token: torch.Tensor,
        req_pool: ReqToTokenPool,
        pools: ModelPools,
        vocab_size: int,
    ) -> None:
        self._graphs = graphs
        self._eager = eager
        self._last_token = last_token
        self._width = graphs.kind.rows_per_request
        self._req_pool = req_pool
        self._page_size = pools.page_size
        self._vocab_size = vocab_size
        largest = graphs.buckets[-1]
        pages = -(-largest * max(CHECK_LENS) // pools.page_size)
        self._num_slots = min(pools.size(FULL), pages * pools.page_size)
        self._num_states = min(pools.size(STATE), largest)
        self._written = WrittenRows(pools, {FULL: self._num_slots, STATE: self._num_states})

    def run(self) -> None:
        """Check every captured bucket; one that differs on any rank is refused with the reason."""
        try:
            for bucket in (size for size in self._graphs.buckets if size not in self._graphs.refused):
                self._graphs.agree(bucket, self._check(bucket) or "")
        finally:
            self._written.clear()

    def _check(self, bucket: int) -> str | None:
        """None when replay equals eager for a batch one short of the bucket (bucket 1: full)."""
        size = max(1, bucket - 1)
        rows = [row for row in (self._req_pool.alloc() for _ in range(size)) if row is not None]
        try:
            if len(rows) < size:
                return f"the request table has fewer than {size} rows"
            needed = size * self._width
            if self._num_slots < needed:
                return f"the KV pool has {self._num_slots} slots, and the step of {size} requests needs {needed}"
            batch = self._batch(rows, torch.Generator().manual_seed(bucket))
            self._written.poison(bucket)
            wanted = [tensor.clone() for tensor in self._eager(batch, bucket).first(needed).tensors()]
            written = self._written.fingerprints()
            self._written.poison(bucket)
            _, output = self._graphs.replay(batch, bucket)
            for ours, theirs in zip(wanted, output.tensors(), strict=True):
                if not torch.equal(ours, theirs):
                    return f"replayed logits differ from eager ones by {float((ours - theirs).abs().max()):.3g}"
                if not bool(ours.isfinite().all()):
                    return "the step's logits are not finite"
            if any(not torch.equal(a, b) for a, b in zip(written, self._written.fingerprints(), strict=True)):
                return "the replayed step wrote other keys, values or states than the eager one"
            return None
        finally:
            for row in rows:
                self._req_pool.free(row)

    def _batch(self, rows: list[int], generator: torch.Generator) -> ModelWorkerBatch:
        """A batch over scattered slots, with contexts of several lengths."""
        # The request table has a column past the context; the RoPE table has no row for it.
        longest = min(max(CHECK_LENS), self._req_pool.max_context_len - 1, self._num_slots // len(rows))
        lens = [max(self._width, min(CHECK_LENS[i % len(CHECK_LENS)], longest)) for i in range(len(rows))]
        order = torch.randperm(self._num_slots, generator=generator) + self._page_size
        slots, used = [], 0
        for row, length in zip(rows, lens, strict=True):
            mine = order[used : used + length]
            used += length
            self._req_pool.write(row, 0, mine)
            slots.append(mine[-self._width :])
        ids = torch.randint(0, self._vocab_size, (len(rows),), generator=generator)
        self._last_token[rows] = ids.to(self._last_token.device)
        states = None
        if self._num_states:
            states = (torch.randperm(self._num_states, generator=generator)[: len(rows)] + 1).tolist()
        return ModelWorkerBatch.uniform(self._graphs.kind, rows, lens, torch.cat(slots), states)

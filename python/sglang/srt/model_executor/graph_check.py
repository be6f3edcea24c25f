"""Start-up proof that replaying a graph equals running its step eagerly, bucket by bucket, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch
from sglang.srt.model_executor.step_graphs import GraphOutput, StepGraphs

# Context lengths of the check, repeated over the batch: odd, one page, more than one split.
CHECK_LENS = (1, 17, 64, 129, 3)


# Bytes of pool memory that are fingerprinted at once.
_CHUNK_BYTES = 1 << 24


class GraphCheck:
    """Compares eager and replayed steps on fixed inputs; it runs while the pools are empty, and leaves them zeroed.

    buffers: what a step writes, each [layers, slots, ...].
    ``eager(batch, bucket)`` runs the padded step without the graph. last_token: where a step finds the ids that its
    requests drew last, by request row.
    """

    def __init__(
        self,
        graphs: StepGraphs,
        eager: Callable[[ModelWorkerBatch, int], GraphOutput],
        last_token: torch.Tensor,
        req_pool: ReqToTokenPool,
        buffers: Sequence[torch.Tensor],
        num_slots: int,
        num_states: int,
        vocab_size: int,
        page_size: int,
    ) -> None:
        self._graphs = graphs
        self._eager = eager
        self._last_token = last_token
        self._width = graphs.kind.rows_per_request
        self._req_pool = req_pool
        self._buffers = buffers
        self._num_slots = num_slots
        self._num_states = num_states
        self._vocab_size = vocab_size
        self._page_size = page_size

    def run(self) -> None:
        """Check every captured bucket; one that differs on any rank is refused with the reason."""
        try:
            for bucket in (size for size in self._graphs.buckets if size not in self._graphs.refused):
                self._graphs.agree(bucket, self._check(bucket) or "")
        finally:
            for buffer in self._buffers:
                buffer.zero_()

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
            self._fill(bucket)
            wanted = [tensor.clone() for tensor in self._eager(batch, bucket).first(needed).tensors()]
            written = self._fingerprints()
            self._fill(bucket)
            _, output = self._graphs.replay(batch, bucket)
            for ours, theirs in zip(wanted, output.tensors(), strict=True):
                if not torch.equal(ours, theirs):
                    return f"replayed logits differ from eager ones by {float((ours - theirs).abs().max()):.3g}"
                if not bool(ours.isfinite().all()):
                    return "the step's logits are not finite"
            if any(not torch.equal(a, b) for a, b in zip(written, self._fingerprints(), strict=True)):
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

    def _fill(self, seed: int) -> None:
        """The same numbers for the same seed: about unit normal, large where only padding reads."""
        for buffer in self._buffers:
            generator = torch.Generator(device=buffer.device).manual_seed(seed)
            for layer in buffer:  # one at a time: the numbers are drawn in float32
                layer.copy_(torch.randn(layer.shape, generator=generator, device=layer.device))
            buffer[:, 0].fill_(min(1e3, torch.finfo(buffer.dtype).max))

    def _fingerprints(self) -> list[torch.Tensor]:
        """For each buffer, one integer a slot past the dummies that changes when any bit of the slot does."""
        return [fingerprint(buffer, self._page_size) for buffer in self._buffers]


def fingerprint(buffer: torch.Tensor, first: int) -> torch.Tensor:
    """buffer [layers, slots, ...] -> [slots - first] int64: a weighted sum of each slot's bits, modulo 2**64."""
    slots = buffer.transpose(0, 1)[first:]
    step = max(1, _CHUNK_BYTES // max(1, slots[0].nbytes)) if slots.shape[0] else 1
    sums = []
    for start in range(0, slots.shape[0], step):
        rows = slots[start : start + step]
        bits = rows.reshape(rows.shape[0], -1).contiguous().view(torch.uint8).to(torch.int64)
        weights = torch.arange(1, bits.shape[1] + 1, device=bits.device) * 2_654_435_761
        sums.append((bits * weights).sum(dim=1))
    return torch.cat(sums) if sums else torch.empty(0, dtype=torch.int64, device=slots.device)

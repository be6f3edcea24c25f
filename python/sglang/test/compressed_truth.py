"""Compressed attention of DeepSeek V4 over plain tensors by request and position: no pools, no states, no pages.

Everything that a step needs is computed again of all tokens so far, so nothing can be stale or cut at the wrong place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.ops.rope.rotary_tail import rotary_tail_torch
from sglang.srt.layers.attention.base_attn_backend import CompressedBackend, CompressedLayer, Compressor
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# (request row, first row of the step, rows, position of the first one)
Part = tuple[int, int, int, int]


class PlainCompressedBackend(CompressedBackend):
    """Window of ``window`` tokens and the best ``top_k`` entries of layers that choose; requests by their table row."""

    def __init__(self, window: int, top_k: int, max_tokens: int = 1024) -> None:
        self.window, self.top_k, self.max_tokens = window, top_k, max_tokens
        self._kept: dict[tuple[str, int, int], Tensor] = {}
        self._compressors: dict[tuple[str, int], Compressor] = {}

    def plan_decode(self, forward_batch: ForwardBatch) -> list[Part]:
        return [
            (row, i, 1, forward_batch.seq_lens_cpu[i] - 1)
            for i, row in enumerate(forward_batch.req_pool_indices.tolist())
        ]

    def plan_extend(self, forward_batch: ForwardBatch) -> list[Part]:
        assert forward_batch.extend_start_loc_cpu is not None and forward_batch.extend_seq_lens_cpu is not None
        lengths = zip(
            forward_batch.req_pool_indices.tolist(),
            forward_batch.extend_start_loc_cpu,
            forward_batch.extend_seq_lens_cpu,
            forward_batch.seq_lens_cpu,
        )
        return [(row, start, count, total - count) for row, start, count, total in lengths]

    def _parts(self, forward_batch: ForwardBatch) -> Iterator[Part]:
        plan = forward_batch.attn_plan.attention
        yield from plan if isinstance(plan, list) else ()

    def _keep(self, what: str, layer_id: int, forward_batch: ForwardBatch, rows: Tensor) -> None:
        for row, start, count, first in self._parts(forward_batch):
            if (what, layer_id, row) not in self._kept:
                self._kept[what, layer_id, row] = rows.new_full((self.max_tokens, rows.shape[1]), float("nan"))
            self._kept[what, layer_id, row][first : first + count] = rows[start : start + count]

    def prepare(
        self, q: Tensor, kv: Tensor, norm: RMSNorm, positions: Tensor, cos_sin_cache: Tensor, layer: CompressedLayer,
        forward_batch: ForwardBatch,
    ) -> Tensor:  # fmt: skip
        rows = rotary_tail_torch(norm(kv).unsqueeze(1), positions, cos_sin_cache)
        self._keep("rows", layer.layer_id, forward_batch, rows.squeeze(1))
        unit = q.float() * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + norm.eps)
        return rotary_tail_torch(unit.to(q.dtype), positions, cos_sin_cache)

    def compress(self, kv: Tensor, gate: Tensor, compressor: Compressor, forward_batch: ForwardBatch) -> None:
        self._compressors[compressor.pool, compressor.layer_id] = compressor
        self._keep(f"{compressor.pool}.kv", compressor.layer_id, forward_batch, kv)
        self._keep(f"{compressor.pool}.gate", compressor.layer_id, forward_batch, gate)

    def _entries(self, pool: str, layer_id: int, row: int, count: int) -> Tensor:
        """The first ``count`` entries [count, width] of a request."""
        c = self._compressors[pool, layer_id]
        kv, gate = (self._kept[f"{pool}.{part}", layer_id, row][: count * c.ratio] for part in ("kv", "gate"))
        kv, gate = (part.float().view(count, c.ratio, -1) for part in (kv, gate))
        gate = gate + c.position_bias
        if kv.shape[2] > c.head_dim:
            before = [torch.cat((t.new_full((1, *t.shape[1:]), fill), t[:-1]))[..., : c.head_dim] for t, fill in (
                (kv, 0.0), (gate, float("-inf")))]  # fmt: skip
            kv = torch.cat((before[0], kv[..., c.head_dim :]), dim=1)
            gate = torch.cat((before[1], gate[..., c.head_dim :]), dim=1)
        pooled = (gate.softmax(1) * kv).sum(1)
        pooled = pooled * torch.rsqrt(pooled.square().mean(-1, keepdim=True) + c.norm.eps) * c.norm.weight
        starts = torch.arange(count) * c.ratio
        return rotary_tail_torch(pooled.unsqueeze(1), starts, c.rotary_emb.cos_sin_cache).squeeze(1)

    def select_entries(self, q: Tensor, weights: Tensor, layer: CompressedLayer, forward_batch: ForwardBatch) -> Tensor:
        chosen = torch.full((q.shape[0], self.top_k), -1, dtype=torch.int32)
        for row, start, count, first in self._parts(forward_batch):
            keys = self._entries("c4_index", layer.layer_id, row, (first + count) // layer.ratio)
            for i in range(start, start + count):
                seen = (first + i - start + 1) // layer.ratio
                scores = (weights[i].float() @ torch.relu(q[i].float() @ keys[:seen].T)).tolist()
                best = sorted(sorted(range(seen), key=lambda w: (-scores[w], w))[: self.top_k])
                chosen[i, : len(best)] = torch.tensor(best, dtype=torch.int32)
        return chosen

    def attend_compressed(
        self, q: Tensor, layer: CompressedLayer, forward_batch: ForwardBatch, entries: Tensor | None = None
    ) -> Tensor:
        out = torch.zeros_like(q)
        for row, start, count, first in self._parts(forward_batch):
            rows = self._kept["rows", layer.layer_id, row].float()
            closed = (first + count) // layer.ratio if layer.ratio else 0
            pooled = self._entries(f"c{layer.ratio}", layer.layer_id, row, closed) if closed else rows[:0]
            for i in range(start, start + count):
                position = first + i - start
                seen = pooled[: (position + 1) // layer.ratio] if layer.ratio else pooled
                if entries is not None and layer.ratio:
                    seen = pooled[[w for w in entries[i].tolist() if w >= 0]]
                kept = torch.cat((rows[max(0, position - self.window + 1) : position + 1], seen))
                scores = torch.cat((q[i].float() @ kept.T * layer.scale, layer.sinks.unsqueeze(1)), dim=1)
                out[i] = scores.softmax(-1)[:, :-1] @ kept
        return out

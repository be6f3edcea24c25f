"""Attention over the paged pools by ops that have torch references: multi-head, grouped-query and latent."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch

from sglang.kernels.ops.attention.decode_padded import decode_padded
from sglang.kernels.ops.attention.extend_attention import extend_attention
from sglang.srt.layers.attention.base_attn_backend import register_attention_backend
from sglang.srt.layers.attention.plans import ExtendPlan
from sglang.srt.layers.attention.pool_backend import GqaBackend, MlaBackend, PoolBackend, no_output
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Requests this much shorter (in tokens) than the longest of their group still share its padded table.
_GROUP_SLACK = 64
# From this length on (in tokens) reading a request once for all of its queries saves more than their mask costs.
_SHARED_LENGTH = 256


@dataclass(frozen=True)
class DecodeGroup:
    """Requests of similar length that decode as one padded batch.

    rows: of their queries, None when the group is the whole batch in order. slot_table [b, L], seq_lens [b].
    """

    rows: torch.Tensor | None
    slot_table: torch.Tensor
    seq_lens: torch.Tensor


# The plan of a decode step: groups that together hold every request.
DecodeGroups = tuple[DecodeGroup, ...]


def group_by_length(seq_lens: list[int]) -> list[list[int]]:
    """Batch rows in groups whose padding at most about doubles what is read; ``[all rows in order]`` when one does."""
    order = sorted(range(len(seq_lens)), key=lambda row: -seq_lens[row])
    groups: list[list[int]] = []
    longest = 0
    for row in order:
        if not groups or 2 * seq_lens[row] + _GROUP_SLACK < longest:
            groups.append([])
            longest = seq_lens[row]
        groups[-1].append(row)
    return [sorted(group) for group in groups]


class TorchNativeAttnBackend(PoolBackend):
    """Plans of both families on the CPU backend, which runs wherever torch runs."""

    prefers = "torch"

    def plans_like(self, other: object) -> bool:
        """See the base class; a plan is of the request table alone. A hybrid model's is that of its softmax layers."""
        other = getattr(other, "full_attn_backend", other)
        return type(other) is type(self) and other.req_to_token is self.req_to_token

    def plan_decode(self, forward_batch: ForwardBatch) -> DecodeGroups:
        return self._groups(forward_batch)

    def plan_uniform(self, forward_batch: ForwardBatch) -> DecodeGroups:
        """See the base class; the rows of a long request are read once for all of its queries."""
        return self._groups(
            forward_batch if max(forward_batch.seq_lens_cpu) >= _SHARED_LENGTH else forward_batch.single_rows()
        )

    def _groups(self, forward_batch: ForwardBatch) -> DecodeGroups:
        assert forward_batch.kind is not None
        groups, width = group_by_length(forward_batch.seq_lens_cpu), forward_batch.kind.rows_per_request
        planned = []
        for members in groups:
            longest = max(forward_batch.seq_lens_cpu[row] for row in members)
            rows, requests, seq_lens = None, forward_batch.req_pool_indices, forward_batch.seq_lens
            if len(groups) > 1:
                rows = torch.tensor(members, device=self.device)
                requests, seq_lens = requests[rows], seq_lens[rows]
                rows = (rows.unsqueeze(1) * width + torch.arange(width, device=self.device)).flatten()
            table = self.req_to_token[:, :longest].index_select(0, requests).long()
            planned.append(DecodeGroup(rows, table, seq_lens))
        return tuple(planned)

    def attend_rows(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor | None, layer: RadixAttention, plan: object
    ) -> torch.Tensor:
        rest = (layer.scaling, layer.v_head_dim)
        if isinstance(plan, ExtendPlan):
            return extend_attention(q, k_cache, v_cache, plan.kv_slot_ids, plan.qo_indptr, plan.kv_indptr, *rest)
        if not isinstance(plan, tuple):
            return no_output(q, plan, layer.num_heads, layer.v_head_dim)
        out = q.new_empty(q.shape[0], layer.num_heads, layer.v_head_dim)
        for group in plan:
            rows = q if group.rows is None else q[group.rows]
            part: torch.Tensor = decode_padded(rows, k_cache, v_cache, group.slot_table, group.seq_lens, *rest)
            if group.rows is None:
                return part
            out[group.rows] = part
        return out

    def extend_plan(self, forward_batch: ForwardBatch, members: list[int]) -> ExtendPlan:
        lengths, starts = forward_batch.extend_seq_lens_cpu, forward_batch.extend_start_loc_cpu
        assert lengths is not None and starts is not None
        requests = forward_batch.req_pool_indices.tolist()
        slots = [self.req_to_token[requests[i], : forward_batch.seq_lens_cpu[i]] for i in members]
        rows = None
        if len(members) < len(lengths):
            rows = torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in members]).to(self.device)
        return ExtendPlan(
            rows,
            torch.cat(slots).long(),
            self._indptr([lengths[i] for i in members]),
            self._indptr([forward_batch.seq_lens_cpu[i] for i in members]),
        )

    def _indptr(self, lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device=self.device)


@register_attention_backend("torch_native", "gqa", platforms=("cpu", "cuda", "hip"))
class TorchNativeGqaBackend(TorchNativeAttnBackend, GqaBackend):
    """Multi-head and grouped-query attention."""


@register_attention_backend("torch_native", "mla", platforms=("cpu", "cuda", "hip"))
class TorchNativeMlaBackend(TorchNativeAttnBackend, MlaBackend):
    """Latent attention."""

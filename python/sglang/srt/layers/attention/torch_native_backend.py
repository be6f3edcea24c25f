"""Attention over the paged pools by ops that have torch references: multi-head, grouped-query and latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch

from sglang.kernels.ops.attention.kv_cache import read_rows
from sglang.kernels.ops.attention.mla_decode import mla_decode
from sglang.kernels.ops.attention.mla_extend import mla_extend
from sglang.kernels.ops.attention.paged_decode import paged_decode
from sglang.kernels.ops.attention.paged_extend import paged_extend
from sglang.kernels.ops.attention.ragged_extend import ragged_extend
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.layers.attention.base_attn_backend import AttentionContext, register_attention_backend
from sglang.srt.layers.attention.pool_backend import PoolAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Requests this much shorter (in tokens) than the longest of their group still share its padded table.
_GROUP_SLACK = 64

# Latent rows [m, R+P] -> keys [m, H, nope], values [m, H, v] and the last columns of every head's keys [m, P].
Expand = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class DecodeGroup:
    """Requests of similar length that decode as one padded batch.

    rows: their rows in the batch, None when the group is the whole batch in order. slot_table [b, L], seq_lens [b].
    """

    rows: torch.Tensor | None
    slot_table: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True)
class ExtendPlan:
    """Packed requests of an extend step: kv_slot_ids [M] int64, qo_indptr and kv_indptr [b+1] int64.

    rows: their token rows in the batch, None when the plan covers all rows in order.
    """

    rows: torch.Tensor | None
    kv_slot_ids: torch.Tensor
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor


class ExpandWhenCheaper:
    """Compares the multiplications of the two forms of latent attention, per head, for n new tokens of m in all.

    Absorbed: each query enters and leaves the latent space, and meets m rows of width 2R + P. Expanded: each of m rows
    becomes a key and a value, and each query meets rows of width nope + P + v.
    """

    def __init__(self, text: DeepseekConfig) -> None:
        self._transform = text.kv_lora_rank * (text.qk_nope_head_dim + text.v_head_dim)
        self._absorbed_row = 2 * text.kv_lora_rank + text.qk_rope_head_dim
        self._expanded_row = text.qk_nope_head_dim + text.qk_rope_head_dim + text.v_head_dim

    def __call__(self, new_tokens: int, total_tokens: int) -> bool:
        pairs = new_tokens * total_tokens
        absorbed = new_tokens * self._transform + pairs * self._absorbed_row
        return total_tokens * self._transform + pairs * self._expanded_row < absorbed


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


@register_attention_backend("torch_native")
class TorchNativeAttnBackend(PoolAttnBackend):
    """The backend of the bare CPU; it runs wherever torch runs.

    Latent attention has two forms with the same result. Absorbed: queries meet the latent rows as they are stored;
    cheap for few queries. Expanded: keys and values are rebuilt from the latents of the whole context; cheap for many.
    Decode is always absorbed.
    """

    prefers = "torch"

    def __init__(self, ctx: AttentionContext) -> None:
        self.req_to_token = ctx.req_to_token_pool.req_to_token
        self.kv_pool = ctx.kv_pool
        self.device = ctx.device
        self.decode_groups: list[DecodeGroup] = []
        self.extend_plan: ExtendPlan | None = None
        self.absorbed_plan: ExtendPlan | None = None
        self.expanded_plan: ExtendPlan | None = None
        text = ctx.model_config.text
        # Which form of latent attention a request of an extend step takes, by its new and its total tokens.
        self.expands = ExpandWhenCheaper(text) if isinstance(text, DeepseekConfig) else None

    def init_forward_metadata(self, fb: ForwardBatch) -> None:
        """Slots of every request of the step, and which form of latent attention each takes."""
        self.decode_groups = []
        self.extend_plan = self.absorbed_plan = self.expanded_plan = None
        if fb.forward_mode.is_decode():
            self._plan_decode(fb)
        elif fb.forward_mode.is_extend():
            self._plan_extend(fb)

    def _plan_decode(self, fb: ForwardBatch) -> None:
        groups = group_by_length(fb.seq_lens_cpu)
        for members in groups:
            longest = max(fb.seq_lens_cpu[row] for row in members)
            rows = torch.tensor(members, device=self.device) if len(groups) > 1 else None
            requests = fb.req_pool_indices if rows is None else fb.req_pool_indices[rows]
            seq_lens = fb.seq_lens if rows is None else fb.seq_lens[rows]
            table = self.req_to_token[:, :longest].index_select(0, requests).long()
            self.decode_groups.append(DecodeGroup(rows, table, seq_lens))

    def _plan_extend(self, fb: ForwardBatch) -> None:
        lengths = fb.extend_seq_lens_cpu
        assert lengths is not None
        everyone = list(range(len(lengths)))
        self.extend_plan = self._extend_plan(fb, everyone)
        if self.expands is not None:
            expanded = [i for i in everyone if self.expands(lengths[i], fb.seq_lens_cpu[i])]
            absorbed = sorted(set(everyone) - set(expanded))
            self.absorbed_plan = self._extend_plan(fb, absorbed) if absorbed else None
            self.expanded_plan = self._extend_plan(fb, expanded) if expanded else None

    def _extend_plan(self, fb: ForwardBatch, members: list[int]) -> ExtendPlan:
        lengths, starts = fb.extend_seq_lens_cpu, fb.extend_start_loc_cpu
        assert lengths is not None and starts is not None
        if len(members) == len(lengths) and self.extend_plan is not None:
            return self.extend_plan
        requests = fb.req_pool_indices.tolist()
        slots = [self.req_to_token[requests[i], : fb.seq_lens_cpu[i]] for i in members]
        rows = None
        if len(members) < len(lengths):
            rows = torch.cat([torch.arange(starts[i], starts[i] + lengths[i]) for i in members]).to(self.device)
        return ExtendPlan(
            rows,
            torch.cat(slots).long() if slots else fb.out_cache_loc.new_empty(0),
            self._indptr([lengths[i] for i in members]),
            self._indptr([fb.seq_lens_cpu[i] for i in members]),
        )

    def _indptr(self, lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int64, device=self.device)

    def attend(self, q: torch.Tensor, layer: RadixAttention, fb: ForwardBatch) -> torch.Tensor:
        """Multi-head or grouped-query attention; see the base class."""
        k_cache, v_cache = self._kv_pool().get_kv_buffer(layer.layer_id)
        out = q.new_empty(q.shape[0], layer.num_heads, layer.v_head_dim)
        if self.extend_plan is not None:
            plan = self.extend_plan
            out = paged_extend(q, k_cache, v_cache, plan.kv_slot_ids, plan.qo_indptr, plan.kv_indptr, layer.scaling)
        for group in self.decode_groups:
            if group.rows is None:
                out = paged_decode(q, k_cache, v_cache, group.slot_table, group.seq_lens, layer.scaling)
            else:
                out[group.rows] = paged_decode(
                    q[group.rows], k_cache, v_cache, group.slot_table, group.seq_lens, layer.scaling
                )
        return out.flatten(1)

    def forward_mla_absorbed(
        self, q: torch.Tensor, layer: RadixAttention, fb: ForwardBatch, plan: ExtendPlan | None = None
    ) -> torch.Tensor:
        """Attend over stored latent rows, this step's included.

        q [n, H, R+P] -> [n, H, R], where n is every row of the step, or the rows of ``plan`` in an extend step.
        ``layer.v_head_dim`` is R.
        """
        cache, rank = self._latent(layer), layer.v_head_dim
        if plan is not None:
            return mla_extend(q, cache, plan.kv_slot_ids, plan.qo_indptr, plan.kv_indptr, rank, layer.scaling)
        out = q.new_empty(q.shape[0], layer.num_heads, rank)
        for group in self.decode_groups:
            if group.rows is None:
                return mla_decode(q, cache, group.slot_table, group.seq_lens, rank, layer.scaling)
            out[group.rows] = mla_decode(q[group.rows], cache, group.slot_table, group.seq_lens, rank, layer.scaling)
        return out

    def gather_latent(self, layer: RadixAttention, plan: ExtendPlan, dtype: torch.dtype) -> torch.Tensor:
        """Latent rows [M, R+P] of the whole contexts of ``plan``'s requests, packed by request, in ``dtype``."""
        return read_rows(self._latent(layer), plan.kv_slot_ids, dtype)

    def forward_mla_expanded(
        self, q: torch.Tensor, expand: Expand, layer: RadixAttention, plan: ExtendPlan
    ) -> torch.Tensor:
        """Attend over keys and values that ``expand`` rebuilds from the latent rows of ``plan``.

        q [n, H, qk] -> [n, H*vd].
        """
        k, v, k_pe = expand(self.gather_latent(layer, plan, q.dtype))
        return ragged_extend(q, k, v, plan.qo_indptr, plan.kv_indptr, layer.scaling, k_pe).flatten(1)

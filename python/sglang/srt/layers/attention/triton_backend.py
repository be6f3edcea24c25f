"""Attention for GPUs: decode straight from the request table, packed prefill, latent attention in both its forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from sglang.kernels.ops.attention.attention_state import extend_state, merge_states
from sglang.kernels.ops.attention.kv_cache import gather_slots, read_rows
from sglang.kernels.ops.attention.mla_extend import mla_extend
from sglang.kernels.ops.attention.paged_extend import paged_extend
from sglang.kernels.ops.attention.ragged_extend import ragged_extend
from sglang.kernels.ops.attention.table_decode import mla_table_decode, table_decode
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.attention.base_attn_backend import AttentionContext, register_attention_backend
from sglang.srt.layers.attention.pool_backend import PoolAttnBackend
from sglang.srt.layers.attention.torch_native_backend import Expand, ExpandWhenCheaper, ExtendPlan
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Latent rows read at once, and keys and values rebuilt from them, in bytes; longer contexts go part by part.
EXPANDED_BYTES = 1 << 30


@dataclass(frozen=True)
class DecodeMetadata:
    """What a decode step reads on the device: rows of the request table [B] int64 and lengths [B] int64."""

    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor


@dataclass(frozen=True)
class PartedPlan:
    """Expanded requests whose keys and values are too many at once: the new tokens, then spans of the prefixes.

    rows: their token rows in the batch, None when they are all rows in order. ``new`` is causal, ``prefix`` is seen
    whole by every query of its request.
    """

    rows: torch.Tensor | None
    new: ExtendPlan
    prefix: tuple[ExtendPlan, ...]


@register_attention_backend("triton")
class TritonAttnBackend(PoolAttnBackend):
    """The portable GPU backend; on a CPU the same plans run over the references of its ops.

    Decode reads the request table and the lengths where they lie, so a captured step needs no further metadata. An
    extend step is planned from host-known lengths and costs one small copy and one gather of slots a plan.
    """

    def __init__(self, ctx: AttentionContext) -> None:
        self.req_to_token = ctx.req_to_token_pool.req_to_token
        self.kv_pool = ctx.kv_pool
        self.device = ctx.device
        self.decode: DecodeMetadata | None = None
        self.extend_plan: ExtendPlan | None = None
        self.absorbed_plan: ExtendPlan | None = None
        self.expanded_plan: ExtendPlan | PartedPlan | None = None
        self._captured: dict[int, DecodeMetadata] = {}
        text = ctx.model_config.text
        self.expands: ExpandWhenCheaper | None = None
        if isinstance(text, DeepseekConfig):
            self.expands = ExpandWhenCheaper(text)
            heads = text.num_attention_heads // get_tp_group().size
            # A gathered row, whose last part all heads share, and what it expands to.
            latent = text.kv_lora_rank + text.qk_rope_head_dim
            columns = latent + heads * (text.qk_nope_head_dim + text.v_head_dim)
            self.max_expanded_rows = max(1, EXPANDED_BYTES // (columns * ctx.model_config.dtype.itemsize))

    def init_forward_metadata(self, fb: ForwardBatch) -> None:
        """Which tensors a decode step reads; or the plans of an extend step."""
        self.decode = self.extend_plan = self.absorbed_plan = self.expanded_plan = None
        if fb.forward_mode.is_decode():
            self.decode = DecodeMetadata(fb.req_pool_indices, fb.seq_lens)
        elif fb.forward_mode.is_extend():
            self._plan_extend(fb)

    def init_cuda_graph_state(self, max_bs: int, max_context_len: int) -> None:
        """Forget earlier captures; raises ValueError when a context would not fit the request table."""
        if max_context_len > self.req_to_token.shape[1]:
            raise ValueError(
                f"graphs for contexts of {max_context_len} tokens need a request table as wide; it has "
                f"{self.req_to_token.shape[1]} columns"
            )
        self._captured = {}

    def init_forward_metadata_capture(self, fb: ForwardBatch) -> None:
        """Record that graphs of ``fb.batch_size`` read these very tensors, which therefore must persist."""
        self.init_forward_metadata(fb)
        assert self.decode is not None, "only decode steps are captured"
        self._captured[fb.batch_size] = self.decode

    def init_forward_metadata_replay(self, fb: ForwardBatch) -> None:
        """Take the captured metadata of this size; raises ValueError when ``fb`` lives in other tensors."""
        captured = self._captured.get(fb.batch_size)
        if captured is None:
            raise ValueError(f"no decode step of {fb.batch_size} requests was captured")
        pairs = ((captured.req_pool_indices, fb.req_pool_indices), (captured.seq_lens, fb.seq_lens))
        if any(ours.data_ptr() != theirs.data_ptr() for ours, theirs in pairs):
            raise ValueError(f"the graph of {fb.batch_size} requests reads other tensors than those of this batch")
        self.extend_plan = self.absorbed_plan = self.expanded_plan = None
        self.decode = captured

    def _plan_extend(self, fb: ForwardBatch) -> None:
        lengths = fb.extend_seq_lens_cpu
        assert lengths is not None
        everyone = list(range(len(lengths)))
        if self.expands is None:
            self.extend_plan = self._plan(fb, everyone, [0] * len(lengths), fb.seq_lens_cpu, self._rows(fb, everyone))
            return
        expanded = [i for i in everyone if self.expands(lengths[i], fb.seq_lens_cpu[i])]
        absorbed = sorted(set(everyone) - set(expanded))
        if absorbed:
            ends = [fb.seq_lens_cpu[i] for i in absorbed]
            self.absorbed_plan = self._plan(fb, absorbed, [0] * len(ends), ends, self._rows(fb, absorbed))
        if expanded:
            self.expanded_plan = self._plan_expanded(fb, expanded)

    def _plan_expanded(self, fb: ForwardBatch, members: list[int]) -> ExtendPlan | PartedPlan:
        lengths = fb.extend_seq_lens_cpu
        assert lengths is not None
        rows = self._rows(fb, members)
        ends = [fb.seq_lens_cpu[i] for i in members]
        if sum(ends) <= self.max_expanded_rows:
            return self._plan(fb, members, [0] * len(ends), ends, rows)
        prefixes = [fb.seq_lens_cpu[i] - lengths[i] for i in members]
        step = max(1, self.max_expanded_rows // max(1, sum(prefix > 0 for prefix in prefixes)))
        parts = []
        for start in range(0, max(prefixes), step):
            starts = [min(start, prefix) for prefix in prefixes]
            stops = [min(start + step, prefix) for prefix in prefixes]
            parts.append(self._plan(fb, members, starts, stops, rows))
        return PartedPlan(rows, self._plan(fb, members, prefixes, ends, rows), tuple(parts))

    def _plan(
        self, fb: ForwardBatch, members: list[int], starts: list[int], ends: list[int], rows: torch.Tensor | None
    ) -> ExtendPlan:
        """Queries of ``members`` against positions ``starts[i]:ends[i]`` of each of them."""
        lengths = fb.extend_seq_lens_cpu
        assert lengths is not None
        qo_indptr = [0, *accumulate(lengths[i] for i in members)]
        kv_indptr = [0, *accumulate(end - start for start, end in zip(starts, ends, strict=True))]
        everyone = len(members) == len(lengths)
        index, first, qo, kv = self._to_device([] if everyone else members, starts, qo_indptr, kv_indptr)
        requests = fb.req_pool_indices if everyone else fb.req_pool_indices.index_select(0, index)
        slots = gather_slots(self.req_to_token, requests, first, kv, kv_indptr[-1])
        return ExtendPlan(rows, slots, qo, kv)

    def _rows(self, fb: ForwardBatch, members: list[int]) -> torch.Tensor | None:
        """Token rows of ``members`` in the batch; None when they are all of it."""
        lengths, starts = fb.extend_seq_lens_cpu, fb.extend_start_loc_cpu
        assert lengths is not None and starts is not None
        if len(members) == len(lengths):
            return None
        (rows,) = self._to_device([row for i in members for row in range(starts[i], starts[i] + lengths[i])])
        return rows

    def _to_device(self, *lists: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """int64 tensors on the device, by one copy that the host does not wait for."""
        packed = torch.tensor([value for values in lists for value in values], dtype=torch.int64)
        if self.device.type != "cpu":
            packed = packed.pin_memory().to(self.device, non_blocking=True)
        return packed.split([len(values) for values in lists])

    def attend(self, q: torch.Tensor, layer: RadixAttention, fb: ForwardBatch) -> torch.Tensor:
        """Multi-head or grouped-query attention; see the base class."""
        k_cache, v_cache = self._kv_pool().get_kv_buffer(layer.layer_id)
        out = q.new_empty(q.shape[0], layer.num_heads, layer.v_head_dim)
        if self.decode is not None:
            meta = self.decode
            out = table_decode(
                q, k_cache, v_cache, self.req_to_token, meta.req_pool_indices, meta.seq_lens, layer.scaling
            )
        elif self.extend_plan is not None:
            plan = self.extend_plan
            out = paged_extend(q, k_cache, v_cache, plan.kv_slot_ids, plan.qo_indptr, plan.kv_indptr, layer.scaling)
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
        if self.decode is None:
            return q.new_empty(q.shape[0], layer.num_heads, rank)
        meta = self.decode
        return mla_table_decode(q, cache, self.req_to_token, meta.req_pool_indices, meta.seq_lens, rank, layer.scaling)

    def gather_latent(self, layer: RadixAttention, plan: ExtendPlan, dtype: torch.dtype) -> torch.Tensor:
        """Latent rows [M, R+P] that ``plan`` names, packed by request, in ``dtype``."""
        return read_rows(self._latent(layer), plan.kv_slot_ids, dtype)

    def forward_mla_expanded(
        self, q: torch.Tensor, expand: Expand, layer: RadixAttention, plan: ExtendPlan | PartedPlan
    ) -> torch.Tensor:
        """Attend over keys and values that ``expand`` rebuilds from latent rows: q [n, H, qk] -> [n, H*v]."""
        if isinstance(plan, ExtendPlan):
            k, v, k_pe = expand(self.gather_latent(layer, plan, q.dtype))
            return ragged_extend(q, k, v, plan.qo_indptr, plan.kv_indptr, layer.scaling, k_pe).flatten(1)
        out, lse = self._expanded_part(q, expand, layer, plan.new, causal=True)
        for part in plan.prefix:
            out, lse = merge_states(out, lse, *self._expanded_part(q, expand, layer, part, causal=False))
        return out.flatten(1)

    def _expanded_part(
        self, q: torch.Tensor, expand: Expand, layer: RadixAttention, part: ExtendPlan, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k, v, k_pe = expand(self.gather_latent(layer, part, q.dtype))
        return extend_state(q, k, v, part.qo_indptr, part.kv_indptr, layer.scaling, causal, k_pe)

"""Attention for GPUs: decode straight from the request table, packed prefill, latent attention in both forms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from sglang.kernels.ops.attention.attention_state import extend_state, merge_states
from sglang.kernels.ops.attention.decode_attention import decode_attention
from sglang.kernels.ops.attention.extend_attention import extend_attention
from sglang.kernels.ops.attention.kv_cache import gather_slots
from sglang.kernels.ops.attention.mla_decode_project import mla_decode_project
from sglang.kernels.ops.quant.group_fp8 import QuantizedRows
from sglang.srt.layers.attention.base_attn_backend import AttentionContext, register_attention_backend
from sglang.srt.layers.attention.plans import ChunkedPrefixPlan, ExtendPlan
from sglang.srt.layers.attention.pool_backend import CapturingPoolBackend, Expand, GqaBackend, MlaBackend, no_output
from sglang.srt.layers.quantization import Rows
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, StepPlan

# Latent rows read at once, and keys and values rebuilt from them, in bytes; longer contexts are processed in chunks.
EXPANDED_BYTES = 1 << 30


@dataclass(frozen=True)
class TableDecodePlan:
    """What a step of ``width`` rows per request reads: rows of the request table and lengths, [B] int64."""

    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    width: int = 1


class TritonAttnBackend(CapturingPoolBackend):
    """Plans of both families on the portable GPU backend. On a CPU they run over the torch references of the ops.

    Decode reads the request table and the lengths in place, so a captured step needs no further metadata. A step
    of several rows per request is planned on the device, within the captured step. An extend step is planned from
    host-known lengths and costs one small copy and one gather of slots per plan; if it is captured, it is planned on
    the device as well.
    """

    plans_bounds = True

    def plan_decode(self, forward_batch: ForwardBatch) -> TableDecodePlan:
        return TableDecodePlan(forward_batch.req_pool_indices, forward_batch.seq_lens)

    def plan_uniform(self, forward_batch: ForwardBatch) -> TableDecodePlan:
        assert forward_batch.kind is not None
        return TableDecodePlan(
            forward_batch.req_pool_indices, forward_batch.seq_lens, forward_batch.kind.rows_per_request
        )

    def init_forward_metadata_capture(self, forward_batch: ForwardBatch) -> None:
        """Record that graphs of this kind and batch size read exactly these tensors, which therefore must persist."""
        plan = self.plan(forward_batch)
        assert isinstance(plan, TableDecodePlan), "only steps that read the table are captured"
        self.keep_captured(forward_batch, plan)

    def init_forward_metadata_replay(self, forward_batch: ForwardBatch) -> None:
        """Use the captured plan of this kind and size; raises ValueError when ``forward_batch`` has other tensors."""
        captured = self.captured_plan(forward_batch)
        assert isinstance(captured, TableDecodePlan)
        pairs = (
            (captured.req_pool_indices, forward_batch.req_pool_indices),
            (captured.seq_lens, forward_batch.seq_lens),
        )
        if any(ours.data_ptr() != theirs.data_ptr() for ours, theirs in pairs):
            raise ValueError(
                f"the graph of {forward_batch.batch_size} requests reads other tensors than those of this batch"
            )
        forward_batch.attn_plan = StepPlan(attention=captured)

    def attend_rows(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor | None, layer: RadixAttention, plan: object
    ) -> torch.Tensor:
        rest = (layer.scaling, layer.v_head_dim)
        out: torch.Tensor
        if isinstance(plan, TableDecodePlan):
            rows = (self.req_to_token, plan.req_pool_indices, plan.seq_lens)
            out = decode_attention(q, k_cache, v_cache, *rows, *rest)
        elif isinstance(plan, ExtendPlan):
            out = extend_attention(q, k_cache, v_cache, plan.kv_slot_ids, plan.qo_indptr, plan.kv_indptr, *rest)
        else:
            out = no_output(q, plan, layer.num_heads, layer.v_head_dim)
        return out

    def extend_plan(self, forward_batch: ForwardBatch, members: list[int]) -> ExtendPlan:
        if (bounds := forward_batch.bounds) is not None:
            requests = forward_batch.req_pool_indices
            first = torch.zeros_like(requests)
            slots = gather_slots(self.req_to_token, requests, first, bounds.kv_indptr, bounds.max_context)
            return ExtendPlan(None, slots, bounds.qo_indptr, bounds.kv_indptr)
        ends = [forward_batch.seq_lens_cpu[i] for i in members]
        return self._plan(forward_batch, members, [0] * len(ends), ends, self._rows(forward_batch, members))

    def _plan(
        self,
        forward_batch: ForwardBatch,
        members: list[int],
        starts: list[int],
        ends: list[int],
        rows: torch.Tensor | None,
    ) -> ExtendPlan:
        """Queries of ``members`` against positions ``starts[i]:ends[i]`` of each of them."""
        lengths = forward_batch.extend_seq_lens_cpu
        assert lengths is not None
        qo_indptr = [0, *accumulate(lengths[i] for i in members)]
        kv_indptr = [0, *accumulate(end - start for start, end in zip(starts, ends, strict=True))]
        everyone = len(members) == len(lengths)
        index, first, qo, kv = self._to_device([] if everyone else members, starts, qo_indptr, kv_indptr)
        requests = forward_batch.req_pool_indices if everyone else forward_batch.req_pool_indices.index_select(0, index)
        slots = gather_slots(self.req_to_token, requests, first, kv, kv_indptr[-1])
        return ExtendPlan(rows, slots, qo, kv)

    def _rows(self, forward_batch: ForwardBatch, members: list[int]) -> torch.Tensor | None:
        """Token rows of ``members`` in the batch; None when they are all rows."""
        lengths, starts = forward_batch.extend_seq_lens_cpu, forward_batch.extend_start_loc_cpu
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


@register_attention_backend("triton", "gqa", platforms=("cuda", "hip"), graphs=True)
class TritonGqaBackend(TritonAttnBackend, GqaBackend):
    """Multi-head and grouped-query attention."""

    def attend(
        self, q: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See the base class; one op attends and gates in steps that read the table."""
        plan = forward_batch.attn_plan.attention
        if gate is None or not isinstance(plan, TableDecodePlan):
            return super().attend(q, layer, forward_batch, gate)
        rows = (self.req_to_token, plan.req_pool_indices, plan.seq_lens)
        caches = self.kv_pool.layer(layer.layer_id)
        out: torch.Tensor = decode_attention(q, *caches, *rows, layer.scaling, layer.v_head_dim, gate)
        return out.flatten(1)


@register_attention_backend("triton", "mla", platforms=("cuda", "hip"), graphs=True)
class TritonMlaBackend(TritonAttnBackend, MlaBackend):
    """Latent attention."""

    def __init__(self, ctx: AttentionContext) -> None:
        super().__init__(ctx)
        shapes = self.shapes
        # Columns of a gathered latent row, whose last part all heads share, and of the keys and values rebuilt from it.
        latent = shapes.kv_lora_rank + shapes.qk_rope_head_dim
        columns = latent + self.num_heads * (shapes.qk_nope_head_dim + shapes.v_head_dim)
        self.max_expanded_rows = max(1, EXPANDED_BYTES // (columns * ctx.model_config.dtype.itemsize))

    def expanded_plan(self, forward_batch: ForwardBatch, members: list[int]) -> ExtendPlan | ChunkedPrefixPlan:
        """See the base class; a context that does not fit at once is cut into chunks."""
        lengths = forward_batch.extend_seq_lens_cpu
        assert lengths is not None
        ends = [forward_batch.seq_lens_cpu[i] for i in members]
        if sum(ends) <= self.max_expanded_rows:
            return super().expanded_plan(forward_batch, members)
        rows = self._rows(forward_batch, members)
        prefixes = [forward_batch.seq_lens_cpu[i] - lengths[i] for i in members]
        step = max(1, self.max_expanded_rows // max(1, sum(prefix > 0 for prefix in prefixes)))
        parts = []
        for start in range(0, max(prefixes), step):
            starts = [min(start, prefix) for prefix in prefixes]
            stops = [min(start + step, prefix) for prefix in prefixes]
            parts.append(self._plan(forward_batch, members, starts, stops, rows))
        return ChunkedPrefixPlan(rows, self._plan(forward_batch, members, prefixes, ends, rows), tuple(parts))

    def decode_absorb(
        self,
        q: torch.Tensor,
        w_vc: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        row_dtype: torch.dtype | None = None,
    ) -> Rows:
        plan = forward_batch.attn_plan.attention
        if not isinstance(plan, TableDecodePlan) or plan.width > 1:
            return super().decode_absorb(q, w_vc, layer, forward_batch)
        rows = (self.req_to_token, plan.req_pool_indices, plan.seq_lens)
        out = mla_decode_project(q, self._latent(layer), *rows, w_vc, layer.scaling, row_dtype)
        return out if row_dtype is None else QuantizedRows(out[0], out[1], q.dtype)

    def forward_mha(
        self, q: torch.Tensor, expand: Expand, layer: RadixAttention, plan: ExtendPlan | ChunkedPrefixPlan
    ) -> torch.Tensor:
        """See the base class; contexts that are too long to be rebuilt at once are processed in chunks."""
        if isinstance(plan, ExtendPlan):
            return super().forward_mha(q, expand, layer, plan)
        out, lse = self._expanded_part(q, expand, layer, plan.new, causal=True)
        for part in plan.prefix:
            out, lse = merge_states(out, lse, *self._expanded_part(q, expand, layer, part, causal=False))
        return out.flatten(1)

    def _expanded_part(
        self, q: torch.Tensor, expand: Expand, layer: RadixAttention, part: ExtendPlan, causal: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        k, v, k_pe = expand(self.gather_latent(layer, part, q.dtype))
        return extend_state(q, k, v, part.qo_indptr, part.kv_indptr, layer.scaling, causal, k_pe)

"""Attention of DeepSeek V4 over paged pools: a window of stored rows and compressed entries, with prefix cache.

One planner and one set of ops for HIP, CUDA and CPU, of the names that HIP's backend has upstream.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.kernels.ops.attention.compress import compress
from sglang.kernels.ops.attention.prepare_compressed import prepare_compressed
from sglang.kernels.ops.attention.select_entries import select_entries
from sglang.kernels.ops.attention.sparse_attention import sparse_attention
from sglang.srt.configs.deepseek_v4 import DeepseekV4Config
from sglang.srt.configs.deepseek_v4_cache import PAGE_SIZE, max_step_rows
from sglang.srt.environ import envs
from sglang.srt.layers.attention.base_attn_backend import (
    AttentionContext,
    CompressedBackend,
    CompressedLayer,
    Compressor,
    UnplannedStepError,
    register_attention_backend,
)
from sglang.srt.layers.attention.deepseek_v4_plan_check import check_plan
from sglang.srt.layers.attention.deepseek_v4_planner import CompressedPlan, StepRows, plan_step
from sglang.srt.layers.attention.plans import NoRows
from sglang.srt.layers.attention.pool_backend import CapturingPoolBackend
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, StepPlan


@dataclass(frozen=True)
class PlanInGraph:
    """The plan of a captured step that is made by its first layer, and so by every replay."""


@register_attention_backend(
    "dsv4", "compressed", platforms=("cpu", "cuda", "hip"), graphs=True, page_sizes=(256,),
    cache_dtypes=("auto", "bfloat16", "fp8_e4m3"),
)  # fmt: skip
@register_attention_backend(
    "compressed", "compressed", platforms=("cpu", "cuda", "hip"), graphs=True, page_sizes=(256,),
    cache_dtypes=("auto", "bfloat16", "fp8_e4m3"),
)  # fmt: skip
class DeepseekV4HipRadixBackend(CapturingPoolBackend, CompressedBackend):
    """Plans on the device alone, so a step is captured with its plan, or planned before each replay.

    windows_only: the layers that it serves have no compressed entries, as those of a draft; nothing is planned for any.
    Raises ValueError for pools of another page size.
    """

    plans_bounds = True

    def __init__(self, ctx: AttentionContext, windows_only: bool = False) -> None:
        super().__init__(ctx)
        if ctx.pools.page_size != PAGE_SIZE:
            raise ValueError(
                f"DeepSeek V4 needs pages of {PAGE_SIZE} tokens, where its entries and states end; the pools have "
                f"pages of {ctx.pools.page_size}: use --page-size {PAGE_SIZE}"
            )
        text = ctx.model_config.text
        assert isinstance(text, DeepseekV4Config), "the settings give this backend to DeepSeek V4 alone"
        assert ctx.window_pages is not None, "a model with a window has a table of its pages"
        self.pools, self.window_pages = ctx.pools, ctx.window_pages
        self.window = text.sliding_window
        self.top_k = text.index_topk
        # Rows of states for each page, by ratio.
        self.rings: dict[int, int] = {}
        for ratio in () if windows_only else (4, 128):
            if any(pool.spec.name == f"c{ratio}" for pool in ctx.pools):
                self.rings[ratio] = PAGE_SIZE // ctx.pools[f"c{ratio}_state"].spec.units_per_row
        self.plans_in_graph = envs.SGLANG_PREP_IN_CUDA_GRAPH.get()
        self._checks_plans = envs.SGLANG_DEBUG_POOL_CHECK.get()

    # --- plans ---------------------------------------------------------------------------------------------------

    def plan_decode(self, forward_batch: ForwardBatch) -> CompressedPlan:
        return self._plan(forward_batch, torch.ones_like(forward_batch.seq_lens), self._longest(forward_batch))

    def plan_extend(self, forward_batch: ForwardBatch) -> CompressedPlan:
        assert forward_batch.extend_seq_lens is not None
        return self._plan(forward_batch, forward_batch.extend_seq_lens, self._longest(forward_batch))

    def plan_uniform(self, forward_batch: ForwardBatch) -> CompressedPlan:
        """See the base class; rows may be rejected later, so what any number of accepted ones needs is kept."""
        assert forward_batch.kind is not None
        width = forward_batch.kind.rows_per_request
        return self._plan_verify(
            forward_batch, torch.full_like(forward_batch.seq_lens, width), width, self._longest(forward_batch)
        )

    def init_forward_metadata_target_verify(
        self, forward_batch: ForwardBatch, extend_seq_lens: torch.Tensor, widest: int
    ) -> None:
        """Plan a step of which any number of rows may be rejected later, but the first of each request.

        extend_seq_lens [B] int64 on the device: rows of each request, packed, at most ``widest``.
        ``forward_batch.seq_lens`` include them. Raises UnplannedStepError if the states have no space for so many
        rows per request.
        """
        forward_batch.attn_plan = StepPlan(
            attention=self._plan_verify(forward_batch, extend_seq_lens, widest, self._longest(forward_batch))
        )

    def _plan_verify(
        self, forward_batch: ForwardBatch, extend_lens: torch.Tensor, widest: int, max_len: int
    ) -> CompressedPlan:
        for ratio, ring in self.rings.items():
            if widest > max_step_rows(ratio, ring):
                raise UnplannedStepError(
                    f"a step of {widest} rows per request, some of which may be rejected, overwrites states of "
                    f"compressed attention that are then needed: {ring} rows for each page and ratio {ratio} allow "
                    f"{max_step_rows(ratio, ring)}; lower --speculative-num-steps"
                )
        return self._plan(forward_batch, extend_lens, max_len)

    def _plan(self, forward_batch: ForwardBatch, extend_lens: torch.Tensor, max_len: int) -> CompressedPlan:
        step = StepRows(
            forward_batch.out_cache_loc, forward_batch.req_pool_indices, forward_batch.seq_lens, extend_lens
        )
        plan = plan_step(step, self.req_to_token, self.window_pages, max_len, self.window, self.rings)
        if self._checks_plans and type(forward_batch.seq_lens_cpu) is list:  # a captured step may not wait
            check_plan(plan, step, self.window, self.rings)
        return plan

    def _longest(self, forward_batch: ForwardBatch) -> int:
        """A bound of the lengths in tokens. A captured step may not ask the host, and gets room for any."""
        lens, longest, bounds = forward_batch.seq_lens_cpu, self.req_to_token.shape[1], forward_batch.bounds
        if bounds is not None:
            return min(longest, bounds.max_context)
        return max(lens) if type(lens) is list and lens else longest

    # --- captured steps ------------------------------------------------------------------------------------------

    def init_forward_metadata_capture(self, forward_batch: ForwardBatch) -> None:
        """Plan inside the captured step, or into tensors that every replay fills first: SGLANG_PREP_IN_CUDA_GRAPH.

        Steps of several rows per request do not come here: their lengths are known within the step alone, which plans
        itself by ``init_forward_metadata``.
        """
        assert (
            forward_batch.kind is not None
            and forward_batch.kind.rows_per_request == 1
            and forward_batch.input_ids is None
        )
        self.keep_captured(forward_batch, PlanInGraph() if self.plans_in_graph else self._plan_captured(forward_batch))

    def init_forward_metadata_replay(self, forward_batch: ForwardBatch) -> None:
        """See the base class. Raises ValueError for a kind and size that was not captured."""
        captured = self.captured_plan(forward_batch)
        if isinstance(captured, CompressedPlan):
            for ours, fresh in zip(captured.tensors(), self._plan_captured(forward_batch).tensors(), strict=True):
                ours.copy_(fresh)
        forward_batch.attn_plan = StepPlan(attention=captured)

    def _plan_captured(self, forward_batch: ForwardBatch) -> CompressedPlan:
        """A plan whose shapes and work do not depend on lengths."""
        return self._plan(forward_batch, torch.ones_like(forward_batch.seq_lens), self.req_to_token.shape[1])

    def complete_plan(self, forward_batch: ForwardBatch) -> None:
        self._plan_of(forward_batch, 0)

    # --- layers --------------------------------------------------------------------------------------------------

    def prepare(
        self,
        q: torch.Tensor,
        kv: torch.Tensor,
        norm: RMSNorm,
        positions: torch.Tensor,
        cos_sin_cache: torch.Tensor,
        layer: CompressedLayer,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        plan = self._plan_of(forward_batch, q.shape[0])
        if plan is None:
            return torch.empty_like(q)
        queries: torch.Tensor = prepare_compressed(
            q, kv, positions, cos_sin_cache, norm.weight, norm.eps, plan.store_slots,
            *self.pools["swa"].layer(layer.layer_id),
        )  # fmt: skip
        return queries

    def compress(
        self, kv: torch.Tensor, gate: torch.Tensor, compressor: Compressor, forward_batch: ForwardBatch
    ) -> None:
        plan = self._plan_of(forward_batch, kv.shape[0])
        if plan is None:
            return
        entries = plan.entries[compressor.ratio]
        one_row_per_request = forward_batch.kind is not None and forward_batch.kind.rows_per_request == 1
        compress(
            kv, gate, *self.pools[f"{compressor.pool}_state"].layer(compressor.layer_id), entries.state_rows,
            entries.sources, compressor.position_bias, compressor.norm.weight, compressor.norm.eps,
            compressor.rotary_emb.cos_sin_cache, entries.first_positions, entries.entry_rows,
            *self._cache(compressor.pool, compressor.layer_id), one_row_per_request,
        )  # fmt: skip

    def select_entries(
        self, q: torch.Tensor, weights: torch.Tensor, layer: CompressedLayer, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        plan = self._plan_of(forward_batch, q.shape[0])
        if plan is None:
            return torch.empty(0, self.top_k, dtype=torch.int32, device=q.device)
        keys, *scales = self.pools["c4_index"].layer(layer.layer_id)
        chosen: torch.Tensor = select_entries(
            q, weights, keys, plan.page_table, plan.requests, plan.entries[layer.ratio].visible,
            PAGE_SIZE // layer.ratio, self.top_k, *scales,
        )  # fmt: skip
        return chosen

    def attend_compressed(
        self, q: torch.Tensor, layer: CompressedLayer, forward_batch: ForwardBatch, entries: torch.Tensor | None = None
    ) -> torch.Tensor:
        plan = self._plan_of(forward_batch, q.shape[0])
        if plan is None:
            return torch.empty_like(q)
        rows, scales = self._cache("swa", layer.layer_id)
        window = (q, rows, plan.window_slots, layer.sinks, layer.scale, scales)
        out: torch.Tensor
        if not layer.ratio:
            out = sparse_attention(*window)
            return out
        cache, entry_scales = self._cache(f"c{layer.ratio}", layer.layer_id)
        out = sparse_attention(
            *window, cache, entry_scales, entries, plan.page_table, plan.requests, plan.entries[layer.ratio].visible,
            PAGE_SIZE // layer.ratio,
        )  # fmt: skip
        return out

    def _cache(self, pool: str, layer_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of a pool, and their scales where it keeps 8 bits."""
        rows, *scales = self.pools[pool].layer(layer_id)
        return rows, scales[0] if scales else None

    def _plan_of(self, forward_batch: ForwardBatch, num_rows: int) -> CompressedPlan | None:
        """The plan of the step, made now where a captured step makes its own; None for a step without rows.

        Raises TypeError for rows that nobody planned.
        """
        plan = forward_batch.attn_plan.attention
        if isinstance(plan, PlanInGraph):
            plan = self._plan_captured(forward_batch)
            # Each run of a captured step has a batch object of its own, so the next run plans again.
            forward_batch.attn_plan = StepPlan(attention=plan)
        if isinstance(plan, CompressedPlan):
            return plan
        if num_rows or not isinstance(plan, NoRows):
            raise TypeError(f"{num_rows} rows to attend, and the step was planned as {type(plan).__name__}")
        return None


class DeepseekV4MultiStepBackend:
    """A chain of ``num_steps`` draft steps of layers with a window alone: one plan, of which each takes its rows.

    ``children`` are the backends of the steps in order.
    """

    def __init__(self, ctx: AttentionContext, num_steps: int) -> None:
        self.children = tuple(DeepseekV4HipRadixBackend(ctx, windows_only=True) for _ in range(num_steps))

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan all steps. ``forward_batch`` has one row per (request, step), with its cache location and position.

        Raises ValueError for another number of rows per request than there are steps.
        """
        assert forward_batch.kind is not None
        if forward_batch.kind.rows_per_request != len(self.children):
            raise ValueError(
                f"{len(self.children)} draft steps, and {forward_batch.kind.rows_per_request} rows per request"
            )
        self.children[0].init_forward_metadata(forward_batch)

    def enter_step(self, chain: ForwardBatch, forward_batch: ForwardBatch, step: int) -> None:
        """Give ``forward_batch``, the rows of ``step``, its backend, slots and plan of the planned ``chain``."""
        plan, num_steps = chain.attn_plan.attention, len(self.children)
        forward_batch.attn_backend = self.children[step]
        forward_batch.out_cache_loc = per_step_draft_out_cache_loc(chain.out_cache_loc, chain.batch_size, num_steps)[
            step
        ]
        if isinstance(plan, CompressedPlan):
            rows = slice(step, None, num_steps)
            # The kernel that stores rows reads their slots one after the other.
            windows = (plan.store_slots[rows].contiguous(), plan.window_slots[rows])
            plan = CompressedPlan(plan.requests[rows], *windows, plan.page_table, {})
        forward_batch.attn_plan = StepPlan(attention=plan)


def per_step_draft_out_cache_loc(out_cache_loc: torch.Tensor, batch_size: int, num_steps: int) -> torch.Tensor:
    """Slots [B * S] of a chain, by (request, step) -> [S, B]. Raises ValueError for another number of slots."""
    if out_cache_loc.numel() != batch_size * num_steps:
        raise ValueError(f"{batch_size} requests of {num_steps} draft steps have {out_cache_loc.numel()} slots")
    return out_cache_loc.view(batch_size, num_steps).transpose(0, 1)

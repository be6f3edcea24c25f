"""The backend of hybrid models: full attention over paged keys and values, gated delta nets over state slots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from sglang.kernels.ops.gdn.chunk import chunk_table
from sglang.kernels.ops.gdn.decode_step import gdn_decode_step
from sglang.kernels.ops.gdn.extend_step import gdn_extend_step
from sglang.kernels.ops.gdn.verify_step import gdn_verify_step
from sglang.srt.layers.attention.base_attn_backend import UnplannedStepError
from sglang.srt.layers.attention.pool_backend import GqaBackend
from sglang.srt.mem_cache.memory_pool import CachePool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ModelWorkerBatch, StepPlan

# mixed_qkv, z, b and a of some tokens
StepRows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class GatedNorm(Protocol):
    """The RMS norm of a head's output, gated by z."""

    weight: torch.Tensor  # [V]
    eps: float


class GatedDeltaNet(Protocol):
    """What a backend reads of a gated-delta-net layer; heads are those of this rank, C = 2*HK*K + HV*V."""

    layer_id: int
    num_v_heads: int
    head_v_dim: int
    A_log: torch.Tensor  # [HV] float32
    dt_bias: torch.Tensor  # [HV]

    @property
    def norm(self) -> GatedNorm: ...

    @property
    def conv_weight(self) -> torch.Tensor: ...  # [C, W]


@dataclass(frozen=True)
class GDNPlan:
    """Which requests of a step advance by one token and which by a chunk, and the state slots of each.

    step_rows, chunk_rows: their token rows in the batch, None when they are the whole batch in order.
    chunk_table: what the op of that name makes of the chunked requests' tokens, packed in order; None for none.
    verifies: the step's requests all bring the rows of a verify step, and the slots do not see them yet.
    """

    step_rows: torch.Tensor | None
    step_slots: torch.Tensor
    chunk_rows: torch.Tensor | None
    chunk_slots: torch.Tensor
    chunk_table: tuple[torch.Tensor, torch.Tensor] | None = None
    verifies: bool = False


class GDNBackend:
    """Convolution and recurrence of gated delta nets on the slots of a state pool; plans in ``attn_plan.states``.

    Every request continues from what its slot holds; the slot of a new sequence has been zeroed by its owner. A
    request that brings one token takes the recurrent form whatever the mode of the step, others the chunked form.

    With speculation a slot has a tail in ``tail_pool``: the rows of its last verify step, and how many of them count.
    The next verify step runs these first. A slot is handed out with an empty tail, copied with its tail, and given back
    with it; so a tail is empty until the first verify step of a request, and no prefill step meets another.
    """

    def __init__(self, state_pool: CachePool, device: torch.device, tail_pool: CachePool | None = None) -> None:
        self.state_pool = state_pool
        self.device = device
        self.tail_pool = tail_pool
        # Rows of a verify step; [L, S], the rows of each slot's tail that count.
        self.num_tail_rows, self._tail_len = 1, None
        if tail_pool is not None:
            self.num_tail_rows, self._tail_len = tail_pool.spec.buffers[0].row_shape[0], tail_pool.buffers()[2]

    def plan_states(self, forward_batch: ForwardBatch) -> GDNPlan:
        """Sort the step's requests into single tokens and chunks. Raises UnplannedStepError, or ValueError without a
        state slot per request."""
        if forward_batch.batch_size == 0:
            none = torch.empty(0, dtype=torch.int64, device=self.device)
            return GDNPlan(None, none, None, none)
        slots = forward_batch.state_slot_ids
        if slots is None or slots.shape[0] != forward_batch.batch_size:
            found = "none" if slots is None else str(slots.shape[0])
            raise ValueError(
                f"a hybrid model needs one state slot per request: {forward_batch.batch_size} requests, {found} given "
                "(ForwardBatch.state_slot_ids)"
            )
        if forward_batch.bounds is not None:
            assert forward_batch.bounds.chunks is not None, "the step was captured for a model without states"
            return GDNPlan(None, slots[:0], None, slots, (forward_batch.bounds.qo_indptr, forward_batch.bounds.chunks))
        if forward_batch.kind is None:
            return self._plan_extend(forward_batch, slots)
        if forward_batch.kind.rows_per_request == 1:
            # Only the batch's own tensor: a captured step reads what the next replay finds in it.
            return GDNPlan(None, slots, None, slots[:0])
        if forward_batch.kind.rows_per_request == self.num_tail_rows:
            return GDNPlan(None, slots, None, slots[:0], verifies=True)
        raise UnplannedStepError(
            f"gated delta nets have no plan for a {forward_batch.kind.name} step of "
            f"{forward_batch.kind.rows_per_request} rows per request, for tails of {self.num_tail_rows}"
        )

    def _plan_extend(self, forward_batch: ForwardBatch, slots: torch.Tensor) -> GDNPlan:
        lengths, starts = forward_batch.extend_seq_lens_cpu, forward_batch.extend_start_loc_cpu
        assert lengths is not None and starts is not None
        if self._tail_len is not None and self.device.type == "cpu":  # elsewhere the host would wait
            assert not self._tail_len[:, slots].any(), "a prefill step would skip rows of a verify step before it"
        steps = [i for i, length in enumerate(lengths) if length == 1]
        chunks = [i for i, length in enumerate(lengths) if length > 1]

        def index(values: list[int]) -> torch.Tensor:
            return _to_device(torch.tensor(values, dtype=torch.int64), slots.device)

        chunk_rows = step_rows = None
        if steps and chunks:
            step_rows = index([starts[i] for i in steps])
            chunk_rows = index([row for i in chunks for row in range(starts[i], starts[i] + lengths[i])])
        table = None
        if chunks:
            bounds, numbers = chunk_table([lengths[i] for i in chunks])
            table = (_to_device(bounds, slots.device), _to_device(numbers, slots.device))
        return GDNPlan(step_rows, slots[index(steps)], chunk_rows, slots[index(chunks)], table)

    def forward_gdn(
        self,
        mixed_qkv: torch.Tensor,
        z: torch.Tensor,
        b: torch.Tensor,
        a: torch.Tensor,
        layer: GatedDeltaNet,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Advance every request's state by its tokens. mixed_qkv [N, C] before the convolution, z [N, HV*V], b, a
        [N, HV] -> [N, HV, V] in mixed_qkv's dtype, normed and gated by z."""
        plan = forward_batch.attn_plan.states
        assert isinstance(plan, GDNPlan), "a step is planned before the layers run"
        rows = (mixed_qkv, z.unflatten(-1, (layer.num_v_heads, layer.head_v_dim)), b, a)
        if plan.verifies:
            return self._verify(rows, layer, plan)
        if plan.chunk_table is None:
            return self._step(rows, layer, plan)
        if plan.step_rows is None or plan.chunk_rows is None:
            return self._chunk(rows, layer, plan)
        out = torch.empty(rows[1].shape, dtype=mixed_qkv.dtype, device=mixed_qkv.device)
        for some, advance in ((plan.step_rows, self._step), (plan.chunk_rows, self._chunk)):
            out[some] = advance((mixed_qkv[some], rows[1][some], b[some], a[some]), layer, plan)
        return out

    def _arguments(self, rows: StepRows, layer: GatedDeltaNet) -> tuple[torch.Tensor, ...]:
        """What both steps take first: rows, parameters and states."""
        parameters = (layer.conv_weight, layer.A_log, layer.dt_bias, layer.norm.weight)
        return (*rows, *parameters, *self.state_pool.layer(layer.layer_id))

    def _step(self, rows: StepRows, layer: GatedDeltaNet, plan: GDNPlan) -> torch.Tensor:
        return gdn_decode_step(*self._arguments(rows, layer), plan.step_slots, layer.norm.eps)

    def _verify(self, rows: StepRows, layer: GatedDeltaNet, plan: GDNPlan) -> torch.Tensor:
        assert self.tail_pool is not None
        tails = self.tail_pool.layer(layer.layer_id)
        return gdn_verify_step(*self._arguments(rows, layer), *tails, plan.step_slots, layer.norm.eps)

    def update_mamba_state_after_mtp_verify(self, slots: torch.Tensor, num_new: torch.Tensor) -> None:
        """Accept the first ``num_new`` [B] int64 rows of a verify step for the states in ``slots`` [B] int64."""
        assert self._tail_len is not None, "only verify steps leave rows behind a state"
        self._tail_len[:, slots] = num_new

    def _chunk(self, rows: StepRows, layer: GatedDeltaNet, plan: GDNPlan) -> torch.Tensor:
        assert plan.chunk_table is not None
        arguments = self._arguments(rows, layer)
        return gdn_extend_step(*arguments, plan.chunk_slots, *plan.chunk_table, layer.norm.eps)


def _to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``host`` on ``device``; from pinned memory where that is not the host, so that nothing waits for the copy."""
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


class HybridLinearAttnBackend:
    """Plans steps for both of its ``parts``: the backend of softmax layers and that of recurrent layers."""

    def __init__(self, full_attn_backend: GqaBackend, linear_attn_backend: GDNBackend) -> None:
        self.full_attn_backend = full_attn_backend
        self.linear_attn_backend = linear_attn_backend
        self.parts = (full_attn_backend, linear_attn_backend)
        self.plans_bounds = full_attn_backend.plans_bounds

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan the step for both backends."""
        self.full_attn_backend.init_forward_metadata(forward_batch)
        self._add_states(forward_batch)

    def replays_extend(self, batch: ModelWorkerBatch) -> bool:
        """See the full-attention backend; recurrent layers have one form for steps of any length."""
        return self.full_attn_backend.replays_extend(batch)

    def init_cuda_graph_state(self, max_bs: int, max_context_len: int) -> None:
        """See the full-attention backend; recurrent layers keep no metadata of their own."""
        self.full_attn_backend.init_cuda_graph_state(max_bs, max_context_len)

    def init_forward_metadata_capture(self, forward_batch: ForwardBatch) -> None:
        """Both backends read persistent tensors only: the state slots of ``forward_batch`` must stay where they are."""
        self.full_attn_backend.init_forward_metadata_capture(forward_batch)
        self._add_states(forward_batch)

    def init_forward_metadata_replay(self, forward_batch: ForwardBatch) -> None:
        """New values are in the captured tensors already."""
        self.full_attn_backend.init_forward_metadata_replay(forward_batch)
        self._add_states(forward_batch)

    def _add_states(self, forward_batch: ForwardBatch) -> None:
        states = self.linear_attn_backend.plan_states(forward_batch)
        forward_batch.attn_plan = StepPlan(forward_batch.attn_plan.attention, states)

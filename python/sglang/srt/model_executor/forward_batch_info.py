"""The batch as it crosses from scheduler to model: host view, device view, and the mode of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, auto
from typing import Any, Protocol

import torch


class ForwardMode(IntEnum):
    """What a forward step does with each request of the batch."""

    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()
    TARGET_VERIFY = auto()
    DRAFT_EXTEND = auto()

    def is_extend(self) -> bool:
        """True when requests may bring more than one token: rows are packed by request."""
        return self in (ForwardMode.EXTEND, ForwardMode.MIXED, ForwardMode.DRAFT_EXTEND)

    def is_decode(self) -> bool:
        return self is ForwardMode.DECODE


class AttentionBackendLike(Protocol):
    """What running a step needs of an attention backend; ``layers/attention`` has what layers need of it."""

    def init_forward_metadata(self, fb: ForwardBatch) -> None: ...

    def init_cuda_graph_state(self, max_bs: int, max_context_len: int) -> None: ...

    def init_forward_metadata_capture(self, fb: ForwardBatch) -> None: ...

    def init_forward_metadata_replay(self, fb: ForwardBatch) -> None: ...


@dataclass(frozen=True)
class StepPlan:
    """What the layers of a step share, as its attention backend planned it: for attention, and for recurrent states.

    Only the backend that made a plan knows its type.
    """

    attention: object = None
    states: object = None


@dataclass(frozen=True)
class LogprobRequest:
    """What one request wants beside its next token.

    ``input_start`` is the first row of this step's chunk whose prompt log-probability is wanted, counted from the
    chunk's first token; ``None`` when no prompt log-probability is wanted. ``input_target_ids[j]`` is the token that
    row ``input_start + j`` is scored against. ``top_k`` is the number of alternatives to return; ``token_ids`` are
    chosen ids whose log-probability is returned.
    """

    input_start: int | None = None
    input_target_ids: tuple[int, ...] = ()
    top_k: int = 0
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ModelWorkerBatch:
    """Host view of one step; nothing below the scheduler sees a request object.

    Shapes: B requests, N tokens (N == B in decode). All tensors live on the host.
    ``seq_lens`` include the tokens of this step. ``input_ids`` is None in decode: the ids are those that the last
    step of each request drew, and they are on the device (see ``TpModelWorker``).
    """

    forward_mode: ForwardMode
    input_ids: torch.Tensor | None  # [N] int64
    positions: torch.Tensor  # [N] int64
    req_pool_indices: torch.Tensor  # [B] int64, rows of req_to_token
    seq_lens: list[int]  # [B]
    out_cache_loc: torch.Tensor  # [N] int64, KV slot of each token
    extend_seq_lens: list[int] | None = None  # [B], extend only
    extend_prefix_lens: list[int] | None = None  # [B], extend only
    state_slot_ids: torch.Tensor | None = None  # [B] int64, recurrent-state slots of hybrid models
    logprobs: list[LogprobRequest | None] = field(default_factory=list)  # [B], or empty when nobody asks
    # Attention data parallelism: tokens that each attention group brings to this step, agreed by all of them.
    global_num_tokens: list[int] | None = None
    # The decode graph that all groups agreed to replay, None when they run eagerly; read with ``global_num_tokens``.
    graph_bucket: int | None = None

    @property
    def batch_size(self) -> int:
        return len(self.seq_lens)

    @classmethod
    def decode(
        cls,
        req_pool_indices: Sequence[int],
        seq_lens: Sequence[int],
        out_cache_loc: torch.Tensor,
        state_slot_ids: Sequence[int] | None = None,
        **rest: Any,
    ) -> ModelWorkerBatch:
        """One token of each request, at position ``seq_lens - 1``; its id is on the device."""
        return cls(
            forward_mode=ForwardMode.DECODE,
            input_ids=None,
            positions=torch.tensor(seq_lens, dtype=torch.int64) - 1,
            req_pool_indices=torch.tensor(req_pool_indices, dtype=torch.int64),
            seq_lens=list(seq_lens),
            out_cache_loc=out_cache_loc,
            state_slot_ids=None if state_slot_ids is None else torch.tensor(state_slot_ids, dtype=torch.int64),
            **rest,
        )

    @classmethod
    def extend(
        cls,
        req_pool_indices: Sequence[int],
        prefix_lens: Sequence[int],
        seq_lens: Sequence[int],
        input_ids: torch.Tensor,
        out_cache_loc: torch.Tensor,
        state_slot_ids: Sequence[int] | None = None,
        forward_mode: ForwardMode = ForwardMode.EXTEND,
        **rest: Any,
    ) -> ModelWorkerBatch:
        """The tokens ``prefix_lens[i] .. seq_lens[i]`` of each request; ``input_ids`` [N] packed by request."""
        spans = list(zip(prefix_lens, seq_lens, strict=True))
        return cls(
            forward_mode=forward_mode,
            input_ids=input_ids,
            positions=torch.cat([torch.arange(start, end) for start, end in spans]),
            req_pool_indices=torch.tensor(req_pool_indices, dtype=torch.int64),
            seq_lens=list(seq_lens),
            out_cache_loc=out_cache_loc,
            extend_seq_lens=[end - start for start, end in spans],
            extend_prefix_lens=list(prefix_lens),
            state_slot_ids=None if state_slot_ids is None else torch.tensor(state_slot_ids, dtype=torch.int64),
            **rest,
        )

    @classmethod
    def idle(cls) -> ModelWorkerBatch:
        """A step without requests, with which an attention group takes part in the others' step."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(ForwardMode.IDLE, none, none, none, [], none)


@dataclass
class ForwardBatch:
    """Device view of one step.

    Extend rows are packed: request ``i`` owns rows ``extend_start_loc_cpu[i]`` up to
    ``extend_start_loc_cpu[i] + extend_seq_lens_cpu[i]``. Decode has one row a request.
    """

    forward_mode: ForwardMode
    batch_size: int
    input_ids: torch.Tensor  # [N] int64
    positions: torch.Tensor  # [N] int64
    req_pool_indices: torch.Tensor  # [B] int64
    seq_lens: torch.Tensor  # [B] int64
    seq_lens_cpu: list[int]  # [B]
    out_cache_loc: torch.Tensor  # [N] int64
    attn_backend: AttentionBackendLike | None
    num_token_non_padded: torch.Tensor  # [1] int32, device
    num_token_non_padded_cpu: int
    attn_plan: StepPlan = StepPlan()
    extend_seq_lens_cpu: list[int] | None = None
    extend_prefix_lens_cpu: list[int] | None = None
    extend_start_loc_cpu: list[int] | None = None
    state_slot_ids: torch.Tensor | None = None  # [B] int64
    logprobs: list[LogprobRequest | None] = field(default_factory=list)
    # Tokens that each attention group brings, padding not counted; None without attention data parallelism.
    global_num_tokens_cpu: list[int] | None = None
    # Rows of each group, padding included, where steps are padded (graphs: all bring the bucket); None: the tokens.
    global_num_rows_cpu: list[int] | None = None

    @property
    def rows_of_groups(self) -> list[int] | None:
        """Rows that each attention group brings, padding included; None without attention data parallelism."""
        return self.global_num_rows_cpu or self.global_num_tokens_cpu

    @classmethod
    def from_worker_batch(
        cls,
        batch: ModelWorkerBatch,
        device: torch.device,
        attn_backend: AttentionBackendLike,
        input_ids: torch.Tensor | None = None,
    ) -> ForwardBatch:
        """Copy the host view to ``device`` (the only host-to-device hop of a step).

        ``input_ids`` [N] int64 on the device stand in for ``batch.input_ids`` where that is None.
        """

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        starts: list[int] | None = None
        if batch.extend_seq_lens is not None:
            starts, total = [], 0
            for length in batch.extend_seq_lens:
                starts.append(total)
                total += length
        ids = batch.input_ids if input_ids is None else input_ids
        assert ids is not None, "a batch without input ids needs them from the device"
        num_tokens = int(ids.shape[0])
        return cls(
            forward_mode=batch.forward_mode,
            batch_size=batch.batch_size,
            input_ids=move(ids),
            positions=move(batch.positions),
            req_pool_indices=move(batch.req_pool_indices),
            seq_lens=move(torch.tensor(batch.seq_lens, dtype=torch.int64)),
            seq_lens_cpu=batch.seq_lens,
            out_cache_loc=move(batch.out_cache_loc),
            attn_backend=attn_backend,
            num_token_non_padded=move(torch.tensor([num_tokens], dtype=torch.int32)),
            num_token_non_padded_cpu=num_tokens,
            extend_seq_lens_cpu=batch.extend_seq_lens,
            extend_prefix_lens_cpu=batch.extend_prefix_lens,
            extend_start_loc_cpu=starts,
            state_slot_ids=None if batch.state_slot_ids is None else move(batch.state_slot_ids),
            logprobs=batch.logprobs,
            global_num_tokens_cpu=batch.global_num_tokens,
        )

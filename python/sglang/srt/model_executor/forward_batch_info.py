"""The batch that the scheduler passes to the model: host view, device view, and the mode of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, auto
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch

_ODD = torch.zeros(1, dtype=torch.int64)  # follows a column of odd length


class ForwardMode(IntEnum):
    """What a forward step does with each request of the batch."""

    EXTEND = auto()
    DECODE = auto()
    MIXED = auto()
    IDLE = auto()
    TARGET_VERIFY = auto()
    DRAFT_EXTEND = auto()

    def is_decode(self) -> bool:
        return self is ForwardMode.DECODE


@dataclass(frozen=True)
class StepKind:
    """A step in which every request has the same number of tokens; such steps can be captured.

    A request has ``rows_per_request`` tokens, the last at position ``seq_lens - 1``. A step of several rows reads its
    lengths on the device (``StepRelay.committed``), and the lengths on the host are upper bounds. ``slots_ahead`` more
    slots after the rows are written to the request table.
    """

    name: str
    rows_per_request: int
    slots_ahead: int = 0


DECODE = StepKind("decode", 1)


class AttentionBackendLike(Protocol):
    """What the execution of a step needs of an attention backend; ``layers/attention`` has what layers need."""

    plans_bounds: bool

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None: ...

    def replays_extend(self, batch: ModelWorkerBatch) -> bool: ...

    def init_cuda_graph_state(self, max_bs: int, max_context_len: int) -> None: ...

    def init_forward_metadata_capture(self, forward_batch: ForwardBatch) -> None: ...

    def init_forward_metadata_replay(self, forward_batch: ForwardBatch) -> None: ...


@dataclass(frozen=True)
class StepPlan:
    """What the backend that made it planned for all layers of a step: attention, and recurrent states."""

    attention: object = None
    states: object = None


@dataclass(frozen=True)
class PackedBounds:
    """Where the requests of a captured extend step are, on the device, because a replay has other lengths.

    qo_indptr, kv_indptr [B+1] int64 cut the rows of the step and the requests' contexts by request; some may have no
    rows, and the last is the padding, without a context. max_context: the most that the last number of kv_indptr can
    be. chunks [NC, 2] int32, for recurrent states: as ``gdn.chunk.chunk_table`` makes them, and some past a request.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    max_context: int
    chunks: torch.Tensor | None = None


@dataclass(frozen=True)
class LogprobRequest:
    """What one request asks for in addition to its next token.

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

    Shapes: B requests, N tokens. All tensors live on the host. ``seq_lens`` include the tokens of this step.
    ``kind`` is None if requests have different numbers of tokens, packed by request; else N is B times its rows.
    ``input_ids`` is None if earlier steps left the ids on the device (``RankMemory.last_token``).
    """

    forward_mode: ForwardMode
    input_ids: torch.Tensor | None  # [N] int64
    positions: torch.Tensor  # [N] int64
    req_pool_indices: torch.Tensor  # [B] int64, rows of req_to_token
    seq_lens: list[int]  # [B]
    out_cache_loc: torch.Tensor  # [N] int64, KV slot of each token
    extend_seq_lens: list[int] | None = None  # [B], extend only
    state_slot_ids: torch.Tensor | None = None  # [B] int64, recurrent-state slots of hybrid models
    logprobs: list[LogprobRequest | None] = field(default_factory=list)  # [B], or empty if no request has one
    # Attention data parallelism: tokens of each attention group in this step, agreed on by all groups.
    global_num_tokens: list[int] | None = None
    kind: StepKind | None = None
    # [B, R]: slots from the step's first position on, if a request has more slots than rows.
    table_loc: torch.Tensor | None = None
    # Extend, if a model drafts: the token after the chunk if the prompt continues, else -1.
    successors: list[int] | None = None
    # The decode graph that all groups agreed to replay, None when they run eagerly; read with ``global_num_tokens``.
    graph_bucket: int | None = None
    # Also, if a model drafts: requests of each group, and whether all may replay their draft chains.
    global_num_requests: list[int] | None = None
    replays_chains: bool = False
    # Whether the host needs the draft tokens that the step verifies.
    tells_drafts: bool = False

    @property
    def batch_size(self) -> int:
        return len(self.seq_lens)

    @classmethod
    def uniform(
        cls,
        kind: StepKind,
        req_pool_indices: Sequence[int],
        seq_lens: Sequence[int],
        out_cache_loc: torch.Tensor,
        state_slot_ids: Sequence[int] | None = None,
        logprobs: Sequence[LogprobRequest | None] = (),
        tells_drafts: bool = False,
    ) -> ModelWorkerBatch:
        """The last ``kind.rows_per_request`` tokens of each request; their ids are on the device.

        out_cache_loc [B * R] int64: slots from the step's first position on, at least one per row.
        """
        width, table = kind.rows_per_request, None
        if out_cache_loc.numel() > len(seq_lens) * width:
            table = out_cache_loc.view(len(seq_lens), -1)
            out_cache_loc = table[:, :width].flatten()
        positions = host_column(seq_lens) - width
        if width > 1:
            positions = (positions.unsqueeze(1) + torch.arange(width)).flatten()
        return cls(
            forward_mode=ForwardMode.DECODE if kind is DECODE else ForwardMode.TARGET_VERIFY,
            input_ids=None,
            positions=positions,
            req_pool_indices=host_column(req_pool_indices),
            seq_lens=list(seq_lens),
            out_cache_loc=out_cache_loc,
            state_slot_ids=None if state_slot_ids is None else host_column(state_slot_ids),
            kind=kind,
            table_loc=table,
            logprobs=list(logprobs),
            tells_drafts=tells_drafts,
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
        logprobs: Sequence[LogprobRequest | None] = (),
        successors: list[int] | None = None,
    ) -> ModelWorkerBatch:
        """The tokens ``prefix_lens[i] .. seq_lens[i]`` of each request; ``input_ids`` [N] packed by request."""
        spans = list(zip(prefix_lens, seq_lens, strict=True))
        return cls(
            forward_mode=forward_mode,
            input_ids=input_ids,
            positions=torch.cat([torch.arange(start, end) for start, end in spans]),
            req_pool_indices=host_column(req_pool_indices),
            seq_lens=list(seq_lens),
            out_cache_loc=out_cache_loc,
            extend_seq_lens=[end - start for start, end in spans],
            state_slot_ids=None if state_slot_ids is None else host_column(state_slot_ids),
            logprobs=list(logprobs),
            successors=successors,
        )

    @classmethod
    def idle(cls, kind: StepKind = DECODE) -> ModelWorkerBatch:
        """A step without requests, by which an attention group joins the others' decode step of ``kind``."""
        none = torch.empty(0, dtype=torch.int64)
        return cls(ForwardMode.IDLE, none, none, none, [], none, kind=kind)


@dataclass
class ForwardBatch:
    """Device view of one step.

    ``kind`` states how many rows each request has. If it is None, rows are packed: request ``i`` owns rows
    ``extend_start_loc_cpu[i]`` up to ``extend_start_loc_cpu[i] + extend_seq_lens_cpu[i]``. ``logits_rows`` [n] int64
    are the rows whose logits are needed; None means every row.
    """

    forward_mode: ForwardMode
    batch_size: int
    input_ids: torch.Tensor | None  # [N] int64; None: the tokens that the last steps sampled
    positions: torch.Tensor  # [N] int64
    req_pool_indices: torch.Tensor  # [B] int64
    seq_lens: torch.Tensor  # [B] int64
    seq_lens_cpu: list[int]  # [B]
    out_cache_loc: torch.Tensor  # [N] int64
    attn_backend: AttentionBackendLike | None
    num_token_non_padded: torch.Tensor  # [1] int32, device
    num_token_non_padded_cpu: int
    kind: StepKind | None = None
    logits_rows: torch.Tensor | None = None
    # Whether the output contains the hidden rows before the head, for a model that drafts from them.
    wants_hidden: bool = False
    attn_plan: StepPlan = StepPlan()
    # Of a captured extend step, in place of the lists below.
    bounds: PackedBounds | None = None
    extend_seq_lens_cpu: list[int] | None = None
    extend_start_loc_cpu: list[int] | None = None
    extend_seq_lens: torch.Tensor | None = None  # [B] int64
    state_slot_ids: torch.Tensor | None = None  # [B] int64
    table_loc: torch.Tensor | None = None  # [B, R] int64; see ModelWorkerBatch
    successors: torch.Tensor | None = None  # [B] int64; see ModelWorkerBatch
    logprobs: list[LogprobRequest | None] = field(default_factory=list)
    # For prompt log-probabilities, requests one after the other: [P] int64 target ids of the scored rows (those of
    # ``logprobs``), and [M] int64 chosen ids of each request with such rows; None for none.
    prompt_targets: torch.Tensor | None = None
    prompt_chosen: torch.Tensor | None = None
    # Tokens of each attention group, without padding; None without attention data parallelism.
    global_num_tokens_cpu: list[int] | None = None
    # Rows of each group with padding, if steps are padded (graphs: the bucket for all); None: the tokens.
    global_num_rows_cpu: list[int] | None = None

    @property
    def rows_of_groups(self) -> list[int] | None:
        """Rows of each attention group, with padding; None without attention data parallelism."""
        return self.global_num_rows_cpu or self.global_num_tokens_cpu

    def first(self, size: int) -> ForwardBatch:
        """The first ``size`` requests of a step with a ``kind``, without the padding after them."""
        assert self.kind is not None
        if size == self.batch_size and self.global_num_rows_cpu is None:
            return self
        rows = size * self.kind.rows_per_request
        return replace(
            self,
            batch_size=size,
            global_num_rows_cpu=None,
            positions=self.positions[:rows],
            req_pool_indices=self.req_pool_indices[:size],
            seq_lens=self.seq_lens[:size],
            seq_lens_cpu=self.seq_lens_cpu[:size],
            out_cache_loc=self.out_cache_loc[:rows],
            table_loc=None if self.table_loc is None else self.table_loc[:size],
            state_slot_ids=None if self.state_slot_ids is None else self.state_slot_ids[:size],
        )

    def single_rows(self) -> ForwardBatch:
        """A step with several rows per request as a decode step, in which each row is a request that ends there."""
        assert self.kind is not None
        width = self.kind.rows_per_request
        back = torch.arange(1 - width, 1, device=self.seq_lens.device)
        return replace(
            self,
            kind=DECODE,
            batch_size=self.batch_size * width,
            req_pool_indices=self.req_pool_indices.repeat_interleave(width),
            seq_lens=(self.seq_lens.unsqueeze(1) + back).flatten(),
            seq_lens_cpu=[length + j for length in self.seq_lens_cpu for j in range(1 - width, 1)],
        )

    @classmethod
    def from_worker_batch(
        cls, batch: ModelWorkerBatch, device: torch.device, attn_backend: AttentionBackendLike | None
    ) -> ForwardBatch:
        """Copy the host view to ``device`` with one asynchronous copy."""
        starts: list[int] | None = None
        last: list[int] = []
        if batch.extend_seq_lens is not None:
            ends = list(accumulate(batch.extend_seq_lens))
            starts = [end - length for end, length in zip(ends, batch.extend_seq_lens, strict=True)]
            last = [end - 1 for end in ends]
        num_tokens = int(batch.positions.shape[0])
        scored = [entry for entry in batch.logprobs if entry is not None and entry.input_start is not None]
        columns = {
            "req_pool_indices": batch.req_pool_indices,
            "seq_lens": host_column(batch.seq_lens),
            "positions": batch.positions,
            "out_cache_loc": batch.out_cache_loc,
            "input_ids": batch.input_ids,
            "extend_seq_lens": None if batch.extend_seq_lens is None else host_column(batch.extend_seq_lens),
            "state_slot_ids": batch.state_slot_ids,
            "table_loc": None if batch.table_loc is None else batch.table_loc.flatten(),
            "successors": None if batch.successors is None else host_column(batch.successors),
            "logits_rows": None if starts is None else host_column(last),
            "prompt_targets": _joined([entry.input_target_ids for entry in scored]),
            "prompt_chosen": _joined([entry.token_ids for entry in scored]),
            "num_token_non_padded": host_column([num_tokens]),
        }
        if batch.kind is not None and batch.kind.rows_per_request > 1:
            # Such a step overwrites them, and on a CPU they are the host's.
            columns |= {"positions": batch.positions.clone(), "out_cache_loc": batch.out_cache_loc.clone()}
        given = {name: column for name, column in columns.items() if column is not None}
        parts: dict[str, Any] = _to_device(given, device)
        parts["num_token_non_padded"] = low_words(parts["num_token_non_padded"])
        if "table_loc" in parts:
            parts["table_loc"] = parts["table_loc"].view(batch.batch_size, -1)
        return cls(
            forward_mode=batch.forward_mode,
            batch_size=batch.batch_size,
            input_ids=parts.pop("input_ids", None),
            seq_lens_cpu=batch.seq_lens,
            attn_backend=attn_backend,
            num_token_non_padded_cpu=num_tokens,
            kind=batch.kind,
            extend_seq_lens_cpu=batch.extend_seq_lens,
            extend_start_loc_cpu=starts,
            logprobs=batch.logprobs,
            global_num_tokens_cpu=batch.global_num_tokens,
            **parts,
        )


def host_column(values: Sequence[int]) -> torch.Tensor:
    """[n] int64 on the host, made with numpy, which takes a third of torch's time for a list."""
    return torch.from_numpy(np.array(values, dtype=np.int64))


def _joined(ids: Sequence[tuple[int, ...]]) -> torch.Tensor | None:
    """All ids one after the other: [sum] int64, None for none."""
    joined = [token_id for part in ids for token_id in part]
    return host_column(joined) if joined else None


def _to_device(columns: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Host columns int64 on ``device``, by one copy."""
    if device.type == "cpu":
        return columns
    return unpacked(pack(columns, pin_memory=True).to(device, non_blocking=True), columns)


def pack(columns: dict[str, torch.Tensor], pin_memory: bool = False) -> torch.Tensor:
    """Columns int64 one after the other, each at a multiple of 16 bytes, so that kernels see the same alignment for any
    number of requests."""
    parts = [part for column in columns.values() for part in (column, _ODD[: column.shape[0] % 2])]
    room = torch.empty(sum(part.shape[0] for part in parts), dtype=torch.int64, pin_memory=pin_memory)
    return torch.cat(parts, out=room)


def unpacked(packed: torch.Tensor, columns: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Views of the result of ``pack(columns)``, by name."""
    sizes = [size for column in columns.values() for size in (column.shape[0], column.shape[0] % 2)]
    return dict(zip(columns, packed.split(sizes)[::2], strict=True))


def low_words(column: torch.Tensor) -> torch.Tensor:
    """The low 32 bits of int64 [..., N], as int32 [..., N] over the same memory: nothing is launched for a view."""
    return column.view(torch.int32)[..., ::2]

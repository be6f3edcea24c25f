"""Steps of one kind, captured once per batch bucket and replayed on persistent buffers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from sglang.srt.distributed.parallel_state import ProcessGroupHandle
from sglang.srt.model_executor.bucket_graphs import BucketGraphs, GraphOutput
from sglang.srt.model_executor.capture_lint import HostList
from sglang.srt.model_executor.forward_batch_info import (
    DECODE,
    AttentionBackendLike,
    ForwardBatch,
    ForwardMode,
    ModelWorkerBatch,
    StepKind,
    host_column,
    low_words,
)
from sglang.srt.platforms.interface import DeviceGraph

# Row numbers in the part of the buffer with one entry per request, and in the part with one per token.
REQ_ROWS, STATES, SEQ_LENS = range(3)
POSITIONS, SLOTS = range(2)
# A host buffer may be written again only after its copy has run, and overlap prepares one step ahead.
NUM_HOST_BUFFERS = 3


def decode_buckets(max_bs: int, sizes: Sequence[int] | None = None) -> list[int]:
    """Batch sizes to capture, ascending: ``sizes`` up to ``max_bs``, or 1, 2, 4, 8, then steps of 8, 16 and 32.

    Raises ValueError when nothing is left to capture.
    """
    if sizes is None:
        sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_bs + 1, 32), max_bs]
    buckets = sorted({size for size in sizes if 1 <= size <= max_bs})
    if not buckets:
        raise ValueError(f"no batch size to capture: {list(sizes)} contains none in 1..{max_bs}")
    return buckets


class StepBuffers:
    """Persistent inputs of captured steps: one packed integer tensor on the device, filled by one copy per step.

    Order: request rows, state slots and lengths; positions and slots of tokens; then the slots for the request table,
    if a step writes more of them than its rows have; then the numbers of tokens and of requests. Rows past the batch
    are padding: tokens of request row ``padding_row`` in slot 0, state slot 0.
    """

    def __init__(
        self, kind: StepKind, max_bs: int, device: torch.device, padding_row: int, num_groups: int = 1
    ) -> None:
        self.kind = kind
        # Even, so that every row begins at a multiple of 16 bytes, as kernels are compiled for.
        self._max_bs = max_bs + max_bs % 2
        self._table_width = kind.rows_per_request + kind.slots_ahead if kind.slots_ahead else 0
        self.packed = self._new(device)
        self.requests, self.tokens, self._table, counts = self._parts(self.packed)
        # [1] int32: what of the batch is no padding.
        self.num_tokens, self.num_requests = low_words(counts[:1]), low_words(counts[1:])
        pinned = device.type != "cpu"
        self._hosts = [self._new(torch.device("cpu"), pin_memory=pinned) for _ in range(NUM_HOST_BUFFERS)]
        self._events: list[torch.cuda.Event | None] = [None] * NUM_HOST_BUFFERS
        self._next = 0
        self._padding_row = padding_row
        self._num_groups = num_groups

    def _new(self, device: torch.device, pin_memory: bool = False) -> torch.Tensor:
        size = self._max_bs * (3 + 2 * self.kind.rows_per_request + self._table_width) + 2
        return torch.zeros(size, dtype=torch.int64, device=device, pin_memory=pin_memory)

    def _parts(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views: by request [3, max_bs], by token [2, max_bs * rows], slots for the table [max_bs, per request], and
        the numbers of tokens and requests [2]."""
        per_request = (3, 2 * self.kind.rows_per_request, self._table_width)
        requests, tokens, table, counts = packed.split([*(self._max_bs * each for each in per_request), 2])
        return requests.view(3, -1), tokens.view(2, -1), table.view(self._max_bs, self._table_width), counts

    def pad(self) -> None:
        """Fill all with padding, before the capture."""
        width = self.kind.rows_per_request
        self.packed.zero_()
        self.requests[REQ_ROWS].fill_(self._padding_row)
        self.requests[SEQ_LENS].fill_(width)
        self.tokens[POSITIONS].copy_(torch.arange(width).repeat(self._max_bs))

    def fill(self, batch: ModelWorkerBatch, bucket: int) -> None:
        """Write a batch and its padding."""
        index = self._next
        self._next = (index + 1) % NUM_HOST_BUFFERS
        event = self._events[index]
        if event is not None:
            event.synchronize()
        width, size = self.kind.rows_per_request, batch.batch_size
        requests, tokens, table, counts = self._parts(self._hosts[index])
        requests[REQ_ROWS, size:bucket] = self._padding_row
        requests[STATES, size:bucket] = 0
        requests[SEQ_LENS, size:bucket] = width
        tokens[POSITIONS, size * width : bucket * width] = torch.arange(width).repeat(bucket - size)
        tokens[SLOTS, size * width : bucket * width] = 0
        table[size:bucket] = 0
        requests[REQ_ROWS, :size] = batch.req_pool_indices
        requests[SEQ_LENS, :size] = host_column(batch.seq_lens)
        tokens[POSITIONS, : size * width] = batch.positions
        tokens[SLOTS, : size * width] = batch.out_cache_loc
        if self._table_width and size:
            assert batch.table_loc is not None, f"a {self.kind.name} step puts slots ahead into the table"
            table[:size] = batch.table_loc
        if batch.state_slot_ids is not None:
            requests[STATES, :size] = batch.state_slot_ids
        counts[0], counts[1] = size * width, size
        self.packed.copy_(self._hosts[index], non_blocking=True)
        if self.packed.device.type != "cpu":
            event = event or torch.cuda.Event()
            event.record()
            self._events[index] = event

    def view(
        self, bucket: int, backend: AttentionBackendLike, has_state: bool, batch: ModelWorkerBatch | None
    ) -> ForwardBatch:
        """The captured step's batch over these buffers; lengths on the host are those of ``batch`` and its padding."""
        width = self.kind.rows_per_request
        real = list(batch.seq_lens) if batch is not None else []
        num_real = (bucket if batch is None else batch.batch_size) * width
        all_ranks = None
        if self._num_groups > 1:
            # In capture and self-check there is no DP exchange: assume every group has this group's token count.
            known = None if batch is None else batch.global_num_tokens
            all_ranks = [num_real] * self._num_groups if known is None else known
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE if self.kind is DECODE else ForwardMode.TARGET_VERIFY,
            batch_size=bucket,
            input_ids=None,
            positions=self.tokens[POSITIONS, : bucket * width],
            req_pool_indices=self.requests[REQ_ROWS, :bucket],
            seq_lens=self.requests[SEQ_LENS, :bucket],
            seq_lens_cpu=real + [width] * (bucket - len(real)),
            out_cache_loc=self.tokens[SLOTS, : bucket * width],
            attn_backend=backend,
            num_token_non_padded=self.num_tokens,
            num_token_non_padded_cpu=num_real,
            kind=self.kind,
            table_loc=self._table[:bucket] if self._table_width else None,
            state_slot_ids=self.requests[STATES, :bucket] if has_state else None,
            global_num_tokens_cpu=all_ranks,
            global_num_rows_cpu=None if all_ranks is None else [bucket * width] * self._num_groups,
        )


class StepOutput(GraphOutput, Protocol):
    """What a captured step of a model gives: tensors with one row per token of the step."""

    def first(self, num_rows: int) -> StepOutput:
        """The output of the first rows."""


class StepGraphs(BucketGraphs[StepOutput]):
    """The steps of one kind of one model. ``forward(forward_batch)`` runs such a step eagerly.

    A step of one row per request is planned outside its graph, by the three hooks of ``backend``; one of several rows
    finds its lengths on the device, and is planned in ``forward``.
    """

    def __init__(
        self,
        kind: StepKind,
        forward: Callable[[ForwardBatch], StepOutput],
        backend: AttentionBackendLike,
        buckets: Sequence[int],
        max_context_len: int,
        device: torch.device,
        padding_row: int,
        has_state: bool,
        num_groups: int = 1,
        world: ProcessGroupHandle | None = None,
    ) -> None:
        super().__init__(kind.name, buckets, device, world)
        self._forward = forward
        self._backend = backend
        self._has_state = has_state
        self.kind = kind
        self._planned_outside = kind.rows_per_request == 1
        self.buffers = StepBuffers(kind, self.buckets[-1], device, padding_row, num_groups)
        if self._planned_outside:
            backend.init_cuda_graph_state(self.buckets[-1], max_context_len)

    def capture(self, create_graph: Callable[[], DeviceGraph]) -> None:
        """Record every bucket; see ``capture_all``."""
        self.buffers.pad()
        self.capture_all(self._body, create_graph)

    def _body(self, bucket: int) -> Callable[[], StepOutput]:
        forward_batch = self.buffers.view(bucket, self._backend, self._has_state, None)
        if self._planned_outside:
            self._backend.init_forward_metadata_capture(forward_batch)
        forward_batch.seq_lens_cpu = HostList(forward_batch.seq_lens_cpu)
        return lambda: self._forward(forward_batch)

    def fill(self, batch: ModelWorkerBatch, bucket: int) -> ForwardBatch:
        """Write ``batch``, which may be empty, and its padding; the step over it."""
        self.buffers.fill(batch, bucket)
        forward_batch = self.buffers.view(bucket, self._backend, self._has_state, batch)
        if self._planned_outside:
            self._backend.init_forward_metadata_replay(forward_batch)
        return forward_batch

    def replay(self, batch: ModelWorkerBatch, bucket: int) -> tuple[ForwardBatch, StepOutput]:
        """Replay ``bucket`` with ``batch``: the padded step, and the output of its own rows until the next replay."""
        forward_batch = self.fill(batch, bucket)
        return forward_batch, self.run(bucket).first(batch.batch_size * self.kind.rows_per_request)

"""Steps of one kind, recorded once for each batch bucket and replayed on persistent buffers."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from sglang.srt.distributed import ProcessGroupHandle
from sglang.srt.model_executor.capture_lint import CaptureOffence, HostOnly, capture_lint, to_the_end
from sglang.srt.model_executor.forward_batch_info import (
    DECODE,
    AttentionBackendLike,
    ForwardBatch,
    ForwardMode,
    ModelWorkerBatch,
    StepKind,
    low_words,
)
from sglang.srt.platforms.interface import DeviceGraph

logger = logging.getLogger(__name__)

# Rows of the part of the buffer that has one entry per request, and of the part that has one per token.
REQ_ROWS, STATES, SEQ_LENS = range(3)
POSITIONS, SLOTS = range(2)
# A host buffer may be written again only after its copy has run: overlap prepares one step ahead.
NUM_HOST_BUFFERS = 3


def decode_buckets(max_bs: int, sizes: Sequence[int] | None = None) -> list[int]:
    """Batch sizes to capture, ascending: ``sizes`` up to ``max_bs``, or 1, 2, 4, 8, then steps of 8, 16 and 32.

    Raises ValueError when nothing is left to capture.
    """
    if sizes is None:
        sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, max_bs + 1, 32), max_bs]
    buckets = sorted({size for size in sizes if 1 <= size <= max_bs})
    if not buckets:
        raise ValueError(f"no batch size to capture: {list(sizes)} holds none in 1..{max_bs}")
    return buckets


class StepBuffers:
    """Persistent inputs of captured steps: one packed integer tensor on the device, filled by one copy per step.

    What only the host knows (request rows, state slots) lies first, then lengths, positions and slots, which the device
    could make of them. Rows past the batch are padding: tokens of request row ``padding_row`` in slot 0, state slot 0.
    """

    def __init__(
        self, kind: StepKind, max_bs: int, device: torch.device, padding_row: int, num_groups: int = 1
    ) -> None:
        self.kind = kind
        # Even, so that every row begins at a multiple of 16 bytes, for which kernels are compiled.
        self._max_bs = max_bs + max_bs % 2
        self.packed = self._new(device)
        self.requests, self.tokens, self._count = self._parts(self.packed)
        pinned = device.type != "cpu"
        self._hosts = [self._new(torch.device("cpu"), pin_memory=pinned) for _ in range(NUM_HOST_BUFFERS)]
        self._events: list[torch.cuda.Event | None] = [None] * NUM_HOST_BUFFERS
        self._next = 0
        self._padding_row = padding_row
        self._num_groups = num_groups

    def _new(self, device: torch.device, pin_memory: bool = False) -> torch.Tensor:
        size = self._max_bs * (3 + 2 * self.kind.rows_per_request) + 1
        return torch.zeros(size, dtype=torch.int64, device=device, pin_memory=pin_memory)

    def _parts(self, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views: by request [3, max_bs], by token [2, max_bs * rows], and the number of tokens [1]."""
        requests, tokens, count = packed.split([3 * self._max_bs, packed.shape[0] - 3 * self._max_bs - 1, 1])
        return requests.view(3, -1), tokens.view(2, -1), count

    def fill(self, batch: ModelWorkerBatch, bucket: int) -> None:
        """Write a batch and its padding."""
        index = self._next
        self._next = (index + 1) % NUM_HOST_BUFFERS
        event = self._events[index]
        if event is not None:
            event.synchronize()
        width, size = self.kind.rows_per_request, batch.batch_size
        requests, tokens, count = self._parts(self._hosts[index])
        requests[REQ_ROWS, size:bucket] = self._padding_row
        requests[STATES, size:bucket] = 0
        requests[SEQ_LENS, size:bucket] = width
        tokens[POSITIONS, size * width : bucket * width] = torch.arange(width).repeat(bucket - size)
        tokens[SLOTS, size * width : bucket * width] = 0
        requests[REQ_ROWS, :size] = batch.req_pool_indices
        requests[SEQ_LENS, :size] = torch.tensor(batch.seq_lens, dtype=torch.int64)
        tokens[POSITIONS, : size * width] = batch.positions
        tokens[SLOTS, : size * width] = batch.out_cache_loc
        if batch.state_slot_ids is not None:
            requests[STATES, :size] = batch.state_slot_ids
        count[0] = size * width
        self.packed.copy_(self._hosts[index], non_blocking=True)
        if self.packed.device.type != "cpu":
            event = event or torch.cuda.Event()
            event.record()
            self._events[index] = event

    def view(
        self, bucket: int, backend: AttentionBackendLike, has_state: bool, batch: ModelWorkerBatch | None
    ) -> ForwardBatch:
        """The captured step's batch over these buffers; host-side lengths are those of ``batch``, padding included."""
        width = self.kind.rows_per_request
        real = list(batch.seq_lens) if batch is not None else []
        num_real = (bucket if batch is None else batch.batch_size) * width
        everyone = None
        if self._num_groups > 1:
            # In capture and self-check nothing is exchanged: every group is taken to bring what this one brings.
            known = None if batch is None else batch.global_num_tokens
            everyone = [num_real] * self._num_groups if known is None else known
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
            num_token_non_padded=low_words(self._count),
            num_token_non_padded_cpu=num_real,
            kind=self.kind,
            state_slot_ids=self.requests[STATES, :bucket] if has_state else None,
            global_num_tokens_cpu=everyone,
            global_num_rows_cpu=None if everyone is None else [bucket * width] * self._num_groups,
        )


class GraphOutput(Protocol):
    """What a captured step gives: tensors with one row per token of the step."""

    def first(self, num_rows: int) -> GraphOutput:
        """The output of the first rows."""

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that a replay must reproduce bit by bit."""


@dataclass(frozen=True)
class CapturedStep:
    """One bucket: its graph, and the output that each replay overwrites."""

    graph: DeviceGraph
    output: GraphOutput


class StepGraphs:
    """Captures and replays the steps of one kind of one model, in step with the other ranks of ``world``.

    ``forward(fb)`` runs the step eagerly on a batch whose metadata is in place.
    """

    def __init__(
        self,
        kind: StepKind,
        forward: Callable[[ForwardBatch], GraphOutput],
        backend: AttentionBackendLike,
        buckets: Sequence[int],
        max_context_len: int,
        device: torch.device,
        padding_row: int,
        has_state: bool,
        num_groups: int = 1,
        world: ProcessGroupHandle | None = None,
    ) -> None:
        self._world = world or ProcessGroupHandle()
        self.buckets = list(buckets)
        self._forward = forward
        self._backend = backend
        self._has_state = has_state
        self.kind = kind
        self.buffers = StepBuffers(kind, self.buckets[-1], device, padding_row, num_groups)
        self._steps: dict[int, CapturedStep] = {}
        self.refused: dict[int, str] = {}
        backend.init_cuda_graph_state(self.buckets[-1], max_context_len)

    def capture(self, create_graph: Callable[[], DeviceGraph], progress: Callable[[int], None]) -> None:
        """Record every bucket, largest first: smaller ones fit into its memory. ``progress(bucket)`` follows each."""
        started = time.perf_counter()
        self.buffers.requests[SEQ_LENS].fill_(self.kind.rows_per_request)
        for bucket in reversed(self.buckets):
            fb = self.buffers.view(bucket, self._backend, self._has_state, None)
            self._backend.init_forward_metadata_capture(fb)
            fb.seq_lens_cpu = HostOnly(fb.seq_lens_cpu)
            # Ranks capture together: collectives may make their connections then.
            if self.agree(bucket, self._offence(fb)):
                self.agree(bucket, self._record(bucket, fb, create_graph()))
            progress(bucket)
        logger.info("captured %d %s graphs in %.1f s", len(self._steps), self.kind.name, time.perf_counter() - started)

    def _offence(self, fb: ForwardBatch) -> str:
        """Run the step twice; what it does that no graph can replay, or ""."""
        try:
            with to_the_end():
                self._forward(fb)  # lazy compilation and workspaces must be done before capture
                with capture_lint(self.buffers.packed.device):
                    self._forward(fb)
        except CaptureOffence as offence:
            return str(offence)
        return ""

    def _record(self, bucket: int, fb: ForwardBatch, graph: DeviceGraph) -> str:
        """Record the step; why that is refused, or "". Other errors raise, once the other ranks know of them."""
        try:
            with capture_lint(self.buffers.packed.device):
                self._steps[bucket] = CapturedStep(graph, graph.capture(lambda: self._forward(fb)))
        except CaptureOffence as offence:
            return str(offence)
        except Exception as error:
            self.agree(bucket, f"{type(error).__name__}: {error}")
            raise
        return ""

    def agree(self, bucket: int, reason: str) -> bool:
        """Refuse ``bucket`` on all ranks when one has a ``reason``; True when none has. Waits for all of them."""
        for rank, theirs in enumerate(self._world.all_gather_text(reason)):
            if theirs:
                self._refuse(bucket, theirs if rank == self._world.rank else f"rank {rank} refuses it: {theirs}")
                return False
        return True

    def _refuse(self, bucket: int, reason: str) -> None:
        """Never replay ``bucket`` again; its batches run eagerly."""
        self.refused[bucket] = reason
        self._steps.pop(bucket, None)
        logger.warning("%s graph of batch size %d is refused: %s", self.kind.name, bucket, reason)

    def bucket_of(self, batch_size: int) -> int | None:
        """The bucket that replays so many requests; None when they must run eagerly."""
        if not 0 < batch_size <= self.buckets[-1]:
            return None
        bucket = self.buckets[bisect_left(self.buckets, batch_size)]
        return bucket if bucket in self._steps else None

    def replay(self, batch: ModelWorkerBatch, bucket: int) -> tuple[ForwardBatch, GraphOutput]:
        """Run ``batch``, which may be empty, through the graph of ``bucket``.

        Returns the step, padding included, and its output for the batch's own rows, valid until the next replay.
        """
        self.buffers.fill(batch, bucket)
        fb = self.buffers.view(bucket, self._backend, self._has_state, batch)
        self._backend.init_forward_metadata_replay(fb)
        step = self._steps[bucket]
        step.graph.replay()
        return fb, step.output.first(batch.batch_size * self.kind.rows_per_request)

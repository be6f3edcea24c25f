"""Decode steps recorded once for each batch bucket and replayed on persistent buffers."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sglang.srt.distributed import ProcessGroupHandle
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.capture_lint import CaptureOffence, HostOnly, capture_lint, to_the_end
from sglang.srt.model_executor.forward_batch_info import (
    AttentionBackendLike,
    ForwardBatch,
    ForwardMode,
    ModelWorkerBatch,
)
from sglang.srt.platforms.interface import DeviceGraph

logger = logging.getLogger(__name__)

# Rows of the one packed host-to-device copy of a decode step.
POSITIONS, REQ_ROWS, SEQ_LENS, SLOTS, STATES = range(5)
NUM_FIELDS = 5
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


class DecodeBuffers:
    """Persistent inputs of captured steps: one packed integer tensor on the device, filled by one copy a step.

    Rows past the batch are padding: request row ``padding_row`` of one token in slot 0, state slot 0.
    """

    def __init__(self, max_bs: int, device: torch.device, padding_row: int, num_groups: int = 1) -> None:
        self.input_ids = torch.zeros(max_bs, dtype=torch.int64, device=device)
        self.packed = torch.zeros(NUM_FIELDS, max_bs, dtype=torch.int64, device=device)
        self.num_token_non_padded = torch.zeros(1, dtype=torch.int32, device=device)
        pinned = device.type != "cpu"
        self._hosts = [
            torch.zeros(NUM_FIELDS, max_bs, dtype=torch.int64, pin_memory=pinned) for _ in range(NUM_HOST_BUFFERS)
        ]
        self._counts = [torch.zeros(1, dtype=torch.int32, pin_memory=pinned) for _ in range(NUM_HOST_BUFFERS)]
        self._events: list[torch.cuda.Event | None] = [None] * NUM_HOST_BUFFERS
        self._next = 0
        self._padding_row = padding_row
        self._num_groups = num_groups

    def fill(self, batch: ModelWorkerBatch, input_ids: torch.Tensor, bucket: int) -> None:
        """Write a decode batch and its padding; ``input_ids`` [B] are on the device."""
        index = self._next
        self._next = (index + 1) % NUM_HOST_BUFFERS
        event = self._events[index]
        if event is not None:
            event.synchronize()
        host, size = self._hosts[index], batch.batch_size
        host[:, size:bucket] = 0
        host[REQ_ROWS, size:bucket] = self._padding_row
        host[SEQ_LENS, size:bucket] = 1
        host[POSITIONS, :size] = batch.positions
        host[REQ_ROWS, :size] = batch.req_pool_indices
        host[SEQ_LENS, :size] = torch.tensor(batch.seq_lens, dtype=torch.int64)
        host[SLOTS, :size] = batch.out_cache_loc
        if batch.state_slot_ids is not None:
            host[STATES, :size] = batch.state_slot_ids
        self._counts[index][0] = size
        self.packed.copy_(host, non_blocking=True)
        self.num_token_non_padded.copy_(self._counts[index], non_blocking=True)
        if self.packed.device.type != "cpu":
            event = event or torch.cuda.Event()
            event.record()
            self._events[index] = event
        self.input_ids[:size].copy_(input_ids)
        self.input_ids[size:bucket].zero_()

    def view(
        self, bucket: int, backend: AttentionBackendLike, has_state: bool, batch: ModelWorkerBatch | None
    ) -> ForwardBatch:
        """The captured step's batch over these buffers; host-side lengths are those of ``batch``, padding included."""
        packed = self.packed[:, :bucket]
        real = list(batch.seq_lens) if batch is not None else []
        num_real = bucket if batch is None else batch.batch_size
        everyone = None
        if self._num_groups > 1:
            # Without word from the others (capture, proof) they bring what this group brings.
            known = None if batch is None else batch.global_num_tokens
            everyone = [num_real] * self._num_groups if known is None else known
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=bucket,
            input_ids=self.input_ids[:bucket],
            positions=packed[POSITIONS],
            req_pool_indices=packed[REQ_ROWS],
            seq_lens=packed[SEQ_LENS],
            seq_lens_cpu=real + [1] * (bucket - len(real)),
            out_cache_loc=packed[SLOTS],
            attn_backend=backend,
            num_token_non_padded=self.num_token_non_padded,
            num_token_non_padded_cpu=num_real,
            state_slot_ids=packed[STATES] if has_state else None,
            global_num_tokens_cpu=everyone,
            global_num_rows_cpu=None if everyone is None else [bucket] * self._num_groups,
        )


@dataclass(frozen=True)
class CapturedStep:
    """One bucket: its graph, and the output that each replay overwrites."""

    graph: DeviceGraph
    output: LogitsProcessorOutput


class DecodeGraphs:
    """Captures and replays the decode step of one model, in step with the other ranks of ``world``.

    ``forward(fb)`` runs the model eagerly on a batch whose metadata is in place.
    """

    def __init__(
        self,
        forward: Callable[[ForwardBatch], LogitsProcessorOutput],
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
        self.buffers = DecodeBuffers(self.buckets[-1], device, padding_row, num_groups)
        self._steps: dict[int, CapturedStep] = {}
        self.refused: dict[int, str] = {}
        backend.init_cuda_graph_state(self.buckets[-1], max_context_len)

    def capture(self, create_graph: Callable[[], DeviceGraph], progress: Callable[[int], None]) -> None:
        """Record every bucket, largest first: smaller ones fit into its memory. ``progress(bucket)`` follows each."""
        started = time.perf_counter()
        self.buffers.packed[SEQ_LENS].fill_(1)
        for bucket in reversed(self.buckets):
            fb = self.buffers.view(bucket, self._backend, self._has_state, None)
            self._backend.init_forward_metadata_capture(fb)
            fb.seq_lens_cpu = HostOnly(fb.seq_lens_cpu)
            # Ranks capture together: collectives may make their connections then.
            if self.agree(bucket, self._offence(fb)):
                self.agree(bucket, self._record(bucket, fb, create_graph()))
            progress(bucket)
        logger.info("captured %d decode graphs in %.1f s", len(self._steps), time.perf_counter() - started)

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
        logger.warning("decode graph of batch size %d is refused: %s", bucket, reason)

    def bucket_of(self, batch_size: int) -> int | None:
        """The bucket that replays so many decoding requests; None when they must run eagerly."""
        if not 0 < batch_size <= self.buckets[-1]:
            return None
        bucket = self.buckets[bisect_left(self.buckets, batch_size)]
        return bucket if bucket in self._steps else None

    def replay(self, batch: ModelWorkerBatch, input_ids: torch.Tensor, bucket: int) -> LogitsProcessorOutput:
        """Run ``batch``, which may be empty, through the graph of ``bucket``.

        The logits [B, V] are valid until the next replay.
        """
        self.buffers.fill(batch, input_ids, bucket)
        fb = self.buffers.view(bucket, self._backend, self._has_state, batch)
        self._backend.init_forward_metadata_replay(fb)
        step = self._steps[bucket]
        step.graph.replay()
        return replace(step.output, next_token_logits=step.output.next_token_logits[: batch.batch_size])

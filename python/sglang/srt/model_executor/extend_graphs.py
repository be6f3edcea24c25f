"""Short extend steps, captured once per number of tokens: a prompt's last tokens after a cached prefix take few
microseconds of each kernel, and launching the kernels one by one takes several times as long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from sglang.kernels.ops.gdn.chunk import CHUNK_SIZE, chunk_table
from sglang.srt.distributed.parallel_state import ProcessGroupHandle
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.model_executor.capture_lint import HostList
from sglang.srt.model_executor.forward_batch_info import (
    AttentionBackendLike,
    ForwardBatch,
    ForwardMode,
    ModelWorkerBatch,
    PackedBounds,
    StepPlan,
    host_column,
    low_words,
    pack,
    unpacked,
)
from sglang.srt.platforms.interface import DeviceGraph

# Requests of a captured step: so many, or one per so many tokens; more of them run eagerly. Each that is not there
# costs programs that end at once.
MIN_REQUESTS, TOKENS_PER_REQUEST = 8, 32
# Tokens of all their contexts.
MAX_CONTEXT = 1 << 18
# Tokens up to which steps are captured by default: from about here on kernels take longer than their launches.
DEFAULT_MAX_TOKENS = 2048


def extend_buckets(max_tokens: int, sizes: Sequence[int] | None = None) -> list[int]:
    """Numbers of tokens to capture, ascending: ``sizes`` up to ``max_tokens``, or powers of two from 8 on, from 512 on
    the numbers halfway between them too, and then ``max_tokens``."""
    if sizes is None:
        powers = [1 << bit for bit in range(3, max_tokens.bit_length())]
        sizes = [*powers, *(3 * power // 2 for power in powers if power >= 512), max_tokens]
    return sorted({size for size in sizes if 1 <= size <= max_tokens})


class ExtendGraphs(BucketGraphs[LogitsProcessorOutput]):
    """Extend steps of one model, planned on the device. ``forward(forward_batch)`` runs one eagerly.

    The rows of a step past those of its batch are padding: one more request, of token 0 in slot 0, which sees no key.
    """

    unit = "tokens"

    def __init__(
        self,
        forward: Callable[[ForwardBatch], LogitsProcessorOutput],
        backend: AttentionBackendLike,
        buckets: Sequence[int],
        max_requests: int,
        max_context_len: int,
        device: torch.device,
        padding_row: int,
        has_state: bool,
        world: ProcessGroupHandle | None = None,
    ) -> None:
        super().__init__("extend", buckets, device, world)
        self._max_requests = max_requests
        self._forward = forward
        self._backend = backend
        self._padding_row = padding_row
        self._has_state = has_state
        self._max_context = min(MAX_CONTEXT, max_requests * max_context_len)
        # Inputs of each bucket on the device, filled by one copy, and the padded step over them.
        self._packed: dict[int, torch.Tensor] = {}
        self._padded: dict[int, ForwardBatch] = {}

    def capture(self, create_graph: Callable[[], DeviceGraph]) -> None:
        """Record every bucket; see ``capture_all``."""
        self.capture_all(self._body, create_graph)

    def _body(self, bucket: int) -> Callable[[], LogitsProcessorOutput]:
        columns = self._columns(None, bucket)
        self._packed[bucket] = pack(columns).to(self._device)
        self._padded[bucket] = padded = self._view(unpacked(self._packed[bucket], columns), bucket)
        return lambda: self._forward(padded)

    def bucket_for(self, batch: ModelWorkerBatch) -> int | None:
        """The graph for ``batch``, the same on every rank; None when it must run eagerly."""
        scored = any(entry is not None and entry.input_start is not None for entry in batch.logprobs)
        # With attention data parallelism other groups' steps may differ.
        if batch.kind is not None or scored or batch.global_num_tokens is not None:
            return None
        bucket = self.bucket_of(batch.positions.shape[0])
        if bucket is None or batch.batch_size > self._room(bucket) or sum(batch.seq_lens) > self._max_context:
            return None
        return bucket if self._backend.replays_extend(batch) else None

    def _room(self, bucket: int) -> int:
        """Requests that a step of ``bucket`` takes, without the padding."""
        return min(self._max_requests, max(MIN_REQUESTS, bucket // TOKENS_PER_REQUEST))

    def fill(self, batch: ModelWorkerBatch, bucket: int) -> ForwardBatch:
        """Write ``batch`` and its padding; the padded step."""
        columns = self._columns(batch, bucket)
        host = pack(columns, pin_memory=self._device.type != "cpu")
        self._packed[bucket].copy_(host, non_blocking=True)
        return self._padded[bucket]

    def replay(self, batch: ModelWorkerBatch, bucket: int) -> tuple[ForwardBatch, LogitsProcessorOutput]:
        """Replay ``bucket`` with ``batch``: the step and its output, both without padding and valid until the next
        replay of ``bucket``, or of any graph."""
        padded = self.fill(batch, bucket)
        return self._own(padded, batch), self.own_output(self.run(bucket), batch)

    @staticmethod
    def own_output(output: LogitsProcessorOutput, batch: ModelWorkerBatch) -> LogitsProcessorOutput:
        """The output of a padded step, of the requests and rows of ``batch`` alone."""
        hidden = output.hidden_states
        return replace(
            output,
            next_token_logits=output.next_token_logits[: batch.batch_size],
            hidden_states=None if hidden is None else hidden[: batch.positions.shape[0]],
        )

    def _columns(self, batch: ModelWorkerBatch | None, bucket: int) -> dict[str, torch.Tensor]:
        """What the device reads of a step, int64 on the host; of padding alone if ``batch`` is None."""
        batch = batch or ModelWorkerBatch.idle()
        lengths, room = batch.extend_seq_lens or [], self._room(bucket)
        absent, spare = [0] * (room - batch.batch_size), bucket - sum(lengths)
        new, seen = [*lengths, *absent, spare], [*batch.seq_lens, *absent, 0]
        rows = list(accumulate(new, initial=0))
        columns = {
            "req_pool_indices": _filled(batch.req_pool_indices, room + 1, self._padding_row),
            "seq_lens": host_column(seen),
            "extend_seq_lens": host_column(new),
            "qo_indptr": host_column(rows),
            "kv_indptr": host_column(list(accumulate(seen, initial=0))),
            "logits_rows": host_column([max(0, row - 1) for row in rows[1:-1]]),
            "successors": host_column([*(batch.successors or [-1] * batch.batch_size), *absent]),
            "input_ids": _filled(batch.input_ids, bucket),
            "positions": _filled(batch.positions, bucket),
            "out_cache_loc": _filled(batch.out_cache_loc, bucket),
            "num_tokens": host_column([sum(lengths)]),
        }
        if self._has_state:
            columns["state_slot_ids"] = _filled(batch.state_slot_ids, room + 1)
            chunks = chunk_table(new)[1]
            past = torch.tensor([room, -(-spare // CHUNK_SIZE)], dtype=torch.int32)
            rest = bucket // CHUNK_SIZE + room + 1 - len(chunks)
            columns["chunks"] = torch.cat((chunks, past.expand(rest, 2))).view(torch.int64).flatten()
        return columns

    def _view(self, parts: dict[str, torch.Tensor], bucket: int) -> ForwardBatch:
        """The padded step over the device tensors ``parts``; a captured step reads no length on the host."""
        chunks = parts["chunks"].view(torch.int32).view(-1, 2) if self._has_state else None
        return ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=self._room(bucket) + 1,
            input_ids=parts["input_ids"],
            positions=parts["positions"],
            req_pool_indices=parts["req_pool_indices"],
            seq_lens=parts["seq_lens"],
            seq_lens_cpu=HostList(),
            out_cache_loc=parts["out_cache_loc"],
            attn_backend=self._backend,
            num_token_non_padded=low_words(parts["num_tokens"]),
            num_token_non_padded_cpu=bucket,
            logits_rows=parts["logits_rows"],
            bounds=PackedBounds(parts["qo_indptr"], parts["kv_indptr"], self._max_context, chunks),
            extend_seq_lens=parts["extend_seq_lens"],
            state_slot_ids=parts.get("state_slot_ids"),
            successors=parts["successors"],
        )

    def _own(self, padded: ForwardBatch, batch: ModelWorkerBatch) -> ForwardBatch:
        """``padded`` as an eager step of ``batch`` has it; not planned."""
        assert batch.extend_seq_lens is not None
        size, num_tokens = batch.batch_size, batch.positions.shape[0]

        def first(column: torch.Tensor | None, count: int) -> torch.Tensor | None:
            return None if column is None else column[:count]

        return replace(
            padded,
            batch_size=size,
            input_ids=first(padded.input_ids, num_tokens),
            positions=padded.positions[:num_tokens],
            req_pool_indices=padded.req_pool_indices[:size],
            seq_lens=padded.seq_lens[:size],
            seq_lens_cpu=batch.seq_lens,
            out_cache_loc=padded.out_cache_loc[:num_tokens],
            num_token_non_padded_cpu=num_tokens,
            logits_rows=first(padded.logits_rows, size),
            attn_plan=StepPlan(),
            bounds=None,
            extend_seq_lens_cpu=batch.extend_seq_lens,
            extend_start_loc_cpu=list(accumulate(batch.extend_seq_lens, initial=0))[:-1],
            extend_seq_lens=first(padded.extend_seq_lens, size),
            state_slot_ids=first(padded.state_slot_ids, size),
            successors=None if batch.successors is None else first(padded.successors, size),
            logprobs=batch.logprobs,
        )


def _filled(values: torch.Tensor | None, size: int, fill: int = 0) -> torch.Tensor:
    """``values`` [n], and then ``fill``: [size] int64."""
    filled = torch.full((size,), fill, dtype=torch.int64)
    if values is not None:
        filled[: values.shape[0]] = values
    return filled

"""One static batch on a ModelRunner, without server or scheduler: prefill, then decode steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.managers.tp_worker import TpModelWorker
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.model_executor.forward_batch_info import DECODE, ModelWorkerBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams


class BatchTooLargeError(RuntimeError):
    """The batch does not fit into the pools."""


class StaticBatch:
    """Requests that start, grow and end together; sampling is greedy.

    ``extend`` appends the next tokens of each prompt, ``decode`` one token each. Both return the next ids [B] (on the
    device) and the logits. ``release`` frees everything.
    """

    _drafts = False

    def __init__(self, runner: ModelRunner, allocator: TokenToKVPoolAllocator, batch_size: int) -> None:
        self.runner = runner
        self.allocator = allocator
        self.rows: list[int] = []
        self.states: list[int] = []
        self.seq_lens = [0] * batch_size
        # KV locations that each request holds: of its tokens, and with draft tokens of some after them.
        self._held = [0] * batch_size
        self._ahead = 0
        # Pages of each request whose window rows were freed.
        self._passed = [0] * batch_size
        if batch_size > runner.req_to_token_pool.available_size():
            raise BatchTooLargeError(
                f"a batch of {batch_size} needs as many request rows, but --max-running-requests gives "
                f"{runner.req_to_token_pool.size}"
            )
        for _ in range(batch_size):
            row = runner.req_to_token_pool.alloc()
            assert row is not None
            self.rows.append(row)
            if runner.memory.state_slots is not None:
                state = runner.memory.state_slots.alloc()
                assert state is not None, "there is a live state for each running request"
                self.states.append(state)
        self._device_rows = torch.tensor(self.rows, dtype=torch.int64).to(runner.device)
        greedy = SamplingParams(temperature=0.0)
        self._info = SamplingBatchInfo.from_rows(
            [SamplingRow(greedy, 0, (), ()) for _ in range(batch_size)], runner.model_config.vocab_size, runner.device
        )

    def extend(self, prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[torch.Tensor, LogitsProcessorOutput]:
        """Append ``prompts[i]`` to request i and compute them in one step."""
        self._leave_windows()
        starts = list(self.seq_lens)
        ends = [start + len(prompt) for start, prompt in zip(starts, prompts, strict=True)]
        slots = self._reach([end + self._ahead for end in ends])
        self.runner.req_to_token_pool.write_extend(self.rows, starts, self._held, slots)
        spans = zip(slots.split([held - start for held, start in zip(self._held, starts)]), prompts)
        batch = ModelWorkerBatch.extend(
            self.rows,
            starts,
            ends,
            torch.from_numpy(np.concatenate([np.asarray(prompt, np.int64) for prompt in prompts])),
            torch.cat([mine[: len(prompt)] for mine, prompt in spans]),
            self.states or None,
            successors=[-1] * len(prompts) if self._drafts else None,
        )
        self.seq_lens = ends
        return self._step(batch)

    def decode(self, ids: torch.Tensor) -> tuple[torch.Tensor, LogitsProcessorOutput]:
        """Append ``ids`` [B], one to each request, and compute them."""
        self._leave_windows()
        positions = list(self.seq_lens)
        ends = [position + 1 for position in positions]
        slots = self._take(self.allocator.alloc_decode(ends, self._last_slots()), len(ends))
        self.runner.req_to_token_pool.write_decode(self.rows, positions, slots)
        self.seq_lens = self._held = ends
        self.runner.last_token.index_copy_(0, self._device_rows, ids.to(torch.int64))
        return self._step(ModelWorkerBatch.uniform(DECODE, self.rows, ends, slots, self.states or None))

    def release(self) -> None:
        """Free KV locations, request rows and states."""
        pool = self.runner.req_to_token_pool
        for row, held in zip(self.rows, self._held, strict=True):
            self.allocator.free(pool.read(row, 0, held))
            pool.free(row)
        for state in self.states:
            assert self.runner.memory.state_slots is not None
            self.runner.memory.state_slots.free(state)
        self.rows, self.states, self.seq_lens, self._held = [], [], [], []

    def _step(self, batch: ModelWorkerBatch) -> tuple[torch.Tensor, LogitsProcessorOutput]:
        step = self.runner.forward(batch)
        return self.runner.sample(step, self._info, batch), step.output

    def _leave_windows(self) -> None:
        """Free the window rows of pages that no later step reads."""
        window, page = self.allocator.window, self.allocator.page_size
        if window is None:
            return
        for number, (row, length) in enumerate(zip(self.rows, self.seq_lens, strict=True)):
            first = max(self._passed[number], length // page - 1)
            if first > self._passed[number]:
                slots = self.runner.req_to_token_pool.read(row, self._passed[number] * page, first * page)
                window.take_back(slots[::page].numpy() // page)
                self._passed[number] = first

    def _reach(self, ends: Sequence[int]) -> torch.Tensor:
        """Reserve KV locations up to the lengths ``ends``; returns the new ones, [N] int64 on the host."""
        ends = [max(held, end) for held, end in zip(self._held, ends, strict=True)]
        needed = sum(ends) - sum(self._held)
        slots = self._take(self.allocator.alloc_extend(self._held, ends, self._last_slots()), needed)
        self._held = ends
        return slots

    def _take(self, slots: torch.Tensor | None, needed: int) -> torch.Tensor:
        window = self.allocator.window
        if slots is None:
            raise BatchTooLargeError(
                f"{needed} more tokens do not fit: {self.allocator.available_size()} of {self.allocator.size} KV "
                f"slots are free{'' if window is None else f', and {window.num_free()} pages of the window'}"
            )
        if window is not None:
            window.flush()
        return slots

    def _last_slots(self) -> list[int]:
        if self.allocator.page_size == 1:
            return [-1] * len(self.rows)
        pool = self.runner.req_to_token_pool
        return [
            int(pool.read(row, held - 1, held)[0]) if held else -1
            for row, held in zip(self.rows, self._held, strict=True)
        ]


class SpeculatingBatch(StaticBatch):
    """The same with draft tokens: a decode step is a verify step, and requests grow by their accepted tokens."""

    _drafts = True

    def __init__(self, worker: TpModelWorker, allocator: TokenToKVPoolAllocator, batch_size: int) -> None:
        assert worker.speculator is not None
        super().__init__(worker.runner, allocator, batch_size)
        self._worker = worker
        self._ahead = worker.speculator.spec.slots_ahead

    def extend(self, prompts: Sequence[Sequence[int] | np.ndarray]) -> tuple[torch.Tensor, LogitsProcessorOutput]:
        """Compute whole prompts in one step."""
        assert not any(self.seq_lens), "a prompt in chunks would need the token after each chunk"
        return super().extend(prompts)

    def decode(self, ids: torch.Tensor) -> tuple[torch.Tensor, LogitsProcessorOutput]:
        """One verify step. ``ids`` are on the device already: the step that sampled them has stored them."""
        kind, pool = self._worker.decode_kind, self.runner.req_to_token_pool
        self._leave_windows()
        starts, held = list(self.seq_lens), list(self._held)
        ends = [start + kind.rows_per_request for start in starts]
        new = self._reach([end + self._ahead for end in ends])
        spans = [(row, at) for row, start, end in zip(self.rows, held, self._held) for at in range(start, end)]
        pool.write_decode([row for row, _ in spans], [at for _, at in spans], new)
        reach = [end + self._ahead for end in ends]
        slots = torch.cat([pool.read(*span) for span in zip(self.rows, starts, reach, strict=True)])
        ids, output, counts = self._launch(ModelWorkerBatch.uniform(kind, self.rows, ends, slots, self.states or None))
        self.seq_lens = [start + count for start, count in zip(starts, counts, strict=True)]
        return ids, output

    def _step(self, batch: ModelWorkerBatch) -> tuple[torch.Tensor, LogitsProcessorOutput]:
        return self._launch(batch)[:2]

    def _launch(self, batch: ModelWorkerBatch) -> tuple[torch.Tensor, LogitsProcessorOutput, list[int]]:
        """The newest id of each request, the logits, and how many tokens each got; waits for the step."""
        forward = self._worker.forward(batch)
        result = forward.sample(self._info).result()
        newest = torch.tensor([tokens[-1] for tokens in result.next_token_ids])
        return newest, forward.step.output, [len(tokens) for tokens in result.next_token_ids]

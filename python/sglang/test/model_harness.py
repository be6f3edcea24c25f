"""Drives a model directly, pools and backend included, without a scheduler: for parity tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sglang.srt.arg_groups.stream_policy import NO_OVERLAP, StreamPlan
from sglang.srt.configs.attention_backends import COMPRESSED
from sglang.srt.configs.cache_layout import FULL, STATE, SWA
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.attention import make_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionContext
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.mem_cache.allocator import ReqToTokenPool, TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import ModelPools, StateSlots
from sglang.srt.mem_cache.window_pages import WindowPages
from sglang.srt.model_executor.forward_batch_info import (
    DECODE,
    ForwardBatch,
    ForwardMode,
    LogprobRequest,
    ModelWorkerBatch,
    StepPlan,
)
from sglang.srt.model_executor.model_pools import cache_layout
from sglang.srt.model_loader.loader import load_model
from sglang.srt.server_args import override_server_args


class EveryRow(nn.Module):
    """Stands in for the logits processor: logits of all rows, not only of each request's last."""

    def forward(self, hidden: torch.Tensor, lm_head: nn.Module, forward_batch: ForwardBatch) -> LogitsProcessorOutput:
        return LogitsProcessorOutput(lm_head(hidden), hidden_states=hidden)


class HarnessRequest:
    """A sequence in the pools: its row of the request table, its tokens so far, its state slot if the model has any."""

    def __init__(self, row: int, state_slot: int | None) -> None:
        self.row = row
        self.state_slot = state_slot
        self.num_tokens = 0


class ModelHarness:
    """One model, its pools (slots handed out in a scrambled order) and its backend.

    ``extend`` takes tokens of several requests in one packed step; ``decode`` one token each. Both return one
    [tokens, V] log-probability tensor a request; with ``every_row=False`` the logits processor's own output.
    ``formats`` are those of ModelConfig.from_path.
    """

    def __init__(
        self,
        model_path: str,
        num_slots: int = 2048,
        max_requests: int = 80,
        page_size: int = 1,
        load_format: str = "auto",
        backend: AttentionBackend | None = None,
        streams: StreamPlan = NO_OVERLAP,
        num_draft_tokens: int = 0,
        **formats: Any,
    ) -> None:
        self.config = ModelConfig.from_path(model_path, **formats)
        with override_server_args():
            self.model = load_model(self.config, load_format, streams=streams)
        device = torch.device("cpu")
        self.requests = ReqToTokenPool(max_requests, min(self.config.context_len, num_slots), device)
        tp_size = get_tp_group().size
        sizes = {FULL: num_slots, SWA: num_slots, STATE: max_requests}
        self.pools = ModelPools(
            cache_layout(self.config, tp_size, num_draft_tokens=num_draft_tokens), sizes, page_size, device
        )
        self.window = None
        if self.pools.layout.has(SWA):
            self.window = WindowPages(num_slots // page_size, num_slots // page_size, page_size)
        self.allocator = TokenToKVPoolAllocator(num_slots, page_size, self.window)
        self._scramble(num_slots, page_size)
        self.state_slots = StateSlots(self.pools) if self.pools.layout.has(STATE) else None
        context = self.context()
        name = "dsv4" if self.config.text.attention_family == COMPRESSED else "torch_native"
        self.backend = backend or make_attention_backend(name, context)
        self._processor = self.model.logits_processor
        # How the last step was planned.
        self.plan = StepPlan()

    def context(self) -> AttentionContext:
        """The context of a backend over the harness's pools."""
        window_pages = None if self.window is None else self.window.table
        return AttentionContext(self.config, self.requests, self.pools, torch.device("cpu"), window_pages)

    def _scramble(self, num_slots: int, page_size: int) -> None:
        slots = self.allocator.alloc(num_slots)
        assert slots is not None
        pages = slots.view(-1, page_size)
        for page in torch.randperm(pages.shape[0], generator=torch.Generator().manual_seed(7)).tolist():
            self.allocator.free(pages[page])
        if self.window is not None:
            random.Random(3).shuffle(self.window._pages._free)

    def reset(self) -> None:
        """Forget every request; slots are handed out from a fresh scrambled pool."""
        self.requests.clear()
        self.allocator.clear()
        self._scramble(self.allocator.size, self.allocator.page_size)
        if self.state_slots is not None:
            self.state_slots.clear()

    def new_request(self) -> HarnessRequest:
        row = self.requests.alloc()
        assert row is not None
        return HarnessRequest(row, self.state_slots.alloc() if self.state_slots is not None else None)

    def extend(
        self,
        chunks: Sequence[tuple[HarnessRequest, Sequence[int]]],
        mode: ForwardMode = ForwardMode.EXTEND,
        logprobs: list[LogprobRequest | None] | None = None,
        every_row: bool = True,
    ) -> list[torch.Tensor] | LogitsProcessorOutput:
        """Run the next tokens of each request as one packed step."""
        requests = [request for request, _ in chunks]
        prefixes = [request.num_tokens for request in requests]
        lengths = [len(tokens) for _, tokens in chunks]
        seq_lens = [prefix + length for prefix, length in zip(prefixes, lengths, strict=True)]
        slots = self.allocator.alloc_extend(prefixes, seq_lens, self._last_slots(requests))
        assert slots is not None, "the harness ran out of slots"
        start = 0
        for request, length in zip(requests, lengths, strict=True):
            self.requests.write(request.row, request.num_tokens, slots[start : start + length])
            request.num_tokens += length
            start += length
        batch = ModelWorkerBatch.extend(
            [request.row for request in requests],
            prefixes,
            seq_lens,
            torch.tensor([token for _, tokens in chunks for token in tokens], dtype=torch.int64),
            slots,
            self._state_slots(requests),
            mode,
            logprobs=logprobs or [],
        )
        out = self.run(batch, every_row)
        if not every_row:
            return out
        return list(out.next_token_logits.log_softmax(-1, dtype=torch.float32).split(lengths))

    def extend_in_chunks(self, request: HarnessRequest, tokens: Sequence[int], size: int) -> torch.Tensor:
        """Run ``tokens`` of one request in steps of ``size``; [tokens, V] log-probabilities."""
        parts = []
        for start in range(0, len(tokens), size):
            out = self.extend([(request, tokens[start : start + size])])
            assert isinstance(out, list)
            parts += out
        return torch.cat(parts)

    def idle(self) -> LogitsProcessorOutput:
        """A step without requests, as a rank with no work runs it."""
        return self.run(ModelWorkerBatch.idle(), every_row=False)

    def decode(self, steps: Sequence[tuple[HarnessRequest, int]]) -> list[torch.Tensor]:
        """Run one token of each request; [1, V] log-probabilities per request."""
        requests = [request for request, _ in steps]
        seq_lens = [request.num_tokens + 1 for request in requests]
        slots = self.allocator.alloc_decode(seq_lens, self._last_slots(requests))
        assert slots is not None, "the harness ran out of slots"
        positions = [request.num_tokens for request in requests]
        self.requests.write_decode([request.row for request in requests], positions, slots)
        for request in requests:
            request.num_tokens += 1
        batch = ModelWorkerBatch.uniform(
            DECODE, [r.row for r in requests], seq_lens, slots, self._state_slots(requests)
        )
        batch = replace(batch, input_ids=torch.tensor([token for _, token in steps], dtype=torch.int64))
        return list(self.run(batch, every_row=True).next_token_logits.log_softmax(-1, dtype=torch.float32).split(1))

    def run(self, batch: ModelWorkerBatch, every_row: bool) -> LogitsProcessorOutput:
        """One forward step of ``batch``."""
        self.model.logits_processor = EveryRow() if every_row else self._processor
        with torch.inference_mode():
            forward_batch = ForwardBatch.from_worker_batch(batch, torch.device("cpu"), self.backend)
            self.backend.init_forward_metadata(forward_batch)
            self.plan = forward_batch.attn_plan
            out: LogitsProcessorOutput = self.model(forward_batch.input_ids, forward_batch.positions, forward_batch)
        return out

    def _last_slots(self, requests: Sequence[HarnessRequest]) -> list[int]:
        return [
            int(self.requests.read(request.row, request.num_tokens - 1, request.num_tokens)[0])
            if request.num_tokens
            else -1
            for request in requests
        ]

    def _state_slots(self, requests: Sequence[HarnessRequest]) -> list[int] | None:
        slots = [request.state_slot for request in requests if request.state_slot is not None]
        return None if self.state_slots is None else slots

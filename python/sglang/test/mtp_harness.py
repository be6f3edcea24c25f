"""Drives a model and its MTP layer over shared pools, without a scheduler: for parity tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from sglang.srt.arg_groups.stream_policy import NO_OVERLAP, StreamPlan
from sglang.srt.configs.cache_layout import STATE
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardBatch, ModelWorkerBatch
from sglang.srt.model_loader.loader import load_draft_model
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.test.model_harness import EveryRow, HarnessRequest, ModelHarness


class MtpHarness(ModelHarness):
    """A model, its draft model, and pools with one more layer, in which the draft has the slots of the model.

    ``extend`` keeps its step and hidden rows; ``draft_extend`` runs the draft over the same rows, and ``draft_decode``
    one more row of a request, as a chain of drafts continues.
    """

    def __init__(self, model_path: str, streams: StreamPlan = NO_OVERLAP, **options: Any) -> None:
        super().__init__(model_path, streams=streams, num_draft_tokens=2, **options)
        with override_server_args():
            args = ServerArgs(model_path=model_path)
            self.draft = load_draft_model(self.config, args, self.model, streams=streams)
        self.draft.logits_processor = EveryRow()

    def run(self, batch: ModelWorkerBatch, every_row: bool) -> LogitsProcessorOutput:
        self.step, self.step_output = batch, super().run(batch, every_row)
        return self.step_output

    @property
    def hidden(self) -> torch.Tensor:
        """The model's rows of the last step after its final norm, [N, H]."""
        hidden = self.step_output.hidden_states
        assert hidden is not None
        return hidden

    def poison_draft(self) -> None:
        """Fill the draft's cached rows with NaN, which spreads from each that a step reads before it is written."""
        for rows in self.cached_rows(self.model.num_hidden_layers):
            rows.fill_(float("nan"))

    def cached_rows(self, layer_id: int) -> list[torch.Tensor]:
        """The cached tensors of a layer of softmax attention, each with a row per slot."""
        held = [pool for pool in self.pools if pool.spec.unit != STATE and layer_id in pool.spec.layer_ids]
        return [rows for pool in held for rows in pool.layer(layer_id)]

    def draft_extend(
        self, next_ids: Sequence[int], hidden: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft over the rows of the model's last step, whose successors are ``next_ids`` [N].

        Returns log-probabilities [N, V] and the draft's rows [N, H].
        """
        batch = replace(self.step, input_ids=torch.tensor(next_ids))
        return self._run_draft(batch, self.hidden if hidden is None else hidden)

    def draft_decode(
        self, request: HarnessRequest, token: int, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One more row of the draft: the newest token and the row [1, H] that proposed it; as ``draft_extend``."""
        seq_lens = [request.num_tokens + 1]
        slots = self.allocator.alloc_decode(seq_lens, self._last_slots([request]))
        assert slots is not None, "the harness ran out of slots"
        self.requests.write_decode([request.row], [request.num_tokens], slots)
        request.num_tokens += 1
        batch = ModelWorkerBatch.uniform(DECODE, [request.row], seq_lens, slots, self._state_slots([request]))
        return self._run_draft(replace(batch, input_ids=torch.tensor([token])), hidden)

    def _run_draft(self, batch: ModelWorkerBatch, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.inference_mode():
            forward_batch = ForwardBatch.from_worker_batch(batch, torch.device("cpu"), self.backend)
            self.backend.init_forward_metadata(forward_batch)
            out = self.draft(forward_batch.input_ids, forward_batch.positions, forward_batch, hidden)
        assert out.hidden_states is not None
        return out.next_token_logits.log_softmax(-1, dtype=torch.float32), out.hidden_states

"""One model of this rank: the forward and the sampling of a step, eager or replayed."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch

from sglang.srt.arg_groups.stream_policy import StreamPlan
from sglang.srt.configs.cache_layout import STATE
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.moe.ep_moe.factory import describe_experts
from sglang.srt.layers.moe.fused_shared_experts import describe_shared
from sglang.srt.layers.sampler import Sampler
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.memory_pool import ModelPools
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.model_executor.extend_graphs import ExtendGraphs
from sglang.srt.model_executor.forward_batch_info import AttentionBackendLike, ForwardBatch, ModelWorkerBatch
from sglang.srt.model_executor.memory_plan import DRAFT_LAYER, count_weights
from sglang.srt.model_executor.model_pools import RankMemory, StepRelay
from sglang.srt.model_executor.step_graphs import StepGraphs
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.utils.multi_stream_utils import trace_reader


@dataclass(frozen=True)
class StepForward:
    """A queued forward: output and padded step, valid until the next replay; ``batch`` is without padding."""

    output: LogitsProcessorOutput
    forward_batch: ForwardBatch
    batch: ModelWorkerBatch
    # Bucket of the replayed step of one kind; None for an eager step, and for an extend step.
    bucket: int | None = None

    @property
    def batch_size(self) -> int:
        """Requests of the batch."""
        return self.batch.batch_size

    @property
    def req_rows(self) -> torch.Tensor:
        """Request rows of the batch, [B]."""
        return self.forward_batch.req_pool_indices[: self.batch_size]

    @property
    def drawn_positions(self) -> torch.Tensor:
        """The position in its sequence of the token that is sampled from each row of logits, [rows]."""
        if self.forward_batch.kind is None:
            return self.forward_batch.seq_lens
        return self.forward_batch.positions[: self.batch_size * self.forward_batch.kind.rows_per_request] + 1


def describe_draft(target: torch.nn.Module, draft: torch.nn.Module) -> dict[str, Any]:
    """What /server_info shows of the draft model, and of how its tokens are verified; msgpack-able."""
    return {
        "rule": "a draft counts while it is the token that the model itself draws there, at every temperature",
        "weights_bytes": count_weights(target, draft)[DRAFT_LAYER],
        "experts": {**describe_experts(draft), "shared": describe_shared(draft)},
    }


@dataclass(frozen=True)
class LoadedModel:
    """One model of this rank with its weights, and what was decided while it was loaded."""

    config: ModelConfig
    module: torch.nn.Module
    device: torch.device
    streams: StreamPlan
    plain_by_split: list[str]
    # The draft model for it, whose KV is one more layer of its pools.
    draft: torch.nn.Module | None = None


def place_rows(forward_batch: ForwardBatch, relay: StepRelay, table: ReqToTokenPool) -> None:
    """Place rows after the committed tokens: overwrites the host's bounds of positions, lengths and slots."""
    assert forward_batch.kind is not None
    rows, width = forward_batch.req_pool_indices, forward_batch.kind.rows_per_request
    positions = forward_batch.positions.view(-1, width)
    torch.add(relay.committed.index_select(0, rows).unsqueeze(1), relay.ahead[:width], out=positions)
    torch.add(positions[:, -1], 1, out=forward_batch.seq_lens)
    forward_batch.out_cache_loc.copy_(table.req_to_token[rows.unsqueeze(1), positions].flatten())


class ModelRunner:
    """Runs steps of one model on the memory of this rank; ``runner_build`` creates it.

    Runners of one rank may share ``memory``. A step reads its input from ``memory.last_token``, and a step of several
    rows per request its lengths and drafts from ``memory.relay``, so it can be queued before the host knows them.
    """

    def __init__(
        self, loaded: LoadedModel, memory: RankMemory, pools: ModelPools, attn_backend: AttentionBackendLike
    ) -> None:
        self.loaded = loaded
        self.model = loaded.module
        self.model_config = loaded.config
        self.device = loaded.device
        self.memory = memory
        self.req_to_token_pool = memory.req_to_token_pool
        self.last_token = memory.last_token
        self.pools = pools
        self.has_state = pools.layout.has(STATE)
        self.attn_backend = attn_backend
        self.sampler = Sampler()
        self.overlap_trace = trace_reader(self.model)
        self.relay = memory.relay
        self.decode_graphs: StepGraphs | None = None
        self.extend_graphs: ExtendGraphs | None = None
        # The same for the draft model's steps, by kind.
        self.draft_graphs: dict[str, BucketGraphs] = {}

    @torch.inference_mode()
    def forward(self, batch: ModelWorkerBatch) -> StepForward:
        """Queue a step: logits of its rows, and the requested prompt log-probabilities."""
        graphs = self.decode_graphs
        if graphs is not None and batch.kind == graphs.kind:
            # With attention data parallelism the groups have agreed on it.
            agreed = batch.global_num_tokens is not None
            bucket = batch.graph_bucket if agreed else self.graph_bucket(batch.batch_size)
            if bucket is not None:
                return self._replay(batch, bucket)
        if self.extend_graphs is not None and (bucket := self.extend_graphs.bucket_for(batch)) is not None:
            own_batch, own_output = self.extend_graphs.replay(batch, bucket)
            return StepForward(own_output, own_batch, batch)
        # A backend may plan from the request table, so the table is completed first.
        forward_batch = self._complete(ForwardBatch.from_worker_batch(batch, self.device, self.attn_backend))
        self.attn_backend.init_forward_metadata(forward_batch)
        return StepForward(self._run_model(forward_batch), forward_batch, batch)

    def _replay(self, batch: ModelWorkerBatch, bucket: int) -> StepForward:
        assert self.decode_graphs is not None
        forward_batch, output = self.decode_graphs.replay(batch, bucket)
        assert isinstance(output, LogitsProcessorOutput)
        return StepForward(output, forward_batch, batch, bucket)

    def graph_bucket(self, batch_size: int) -> int | None:
        """The decode graph for so many requests, the same on every rank; None when they run eagerly."""
        return None if self.decode_graphs is None else self.decode_graphs.bucket_of(batch_size)

    def describe(self) -> dict[str, Any]:
        """What /server_info shows of the model; msgpack-able."""
        streams = {**self.loaded.streams.describe(), "trace": self.overlap_trace()}
        experts = {**describe_experts(self.model), "shared": describe_shared(self.model)}
        all_graphs: list[BucketGraphs[Any] | None] = [self.decode_graphs, self.extend_graphs]
        all_graphs += self.draft_graphs.values()
        graphs = {each.name: each.describe() for each in all_graphs if each is not None}
        draft = {} if self.loaded.draft is None else {"draft": describe_draft(self.model, self.loaded.draft)}
        return {
            **draft,
            "experts": experts,
            "streams": streams,
            "graphs": graphs,
            "plain_by_split": self.loaded.plain_by_split,
        }

    def drop_graphs(self) -> None:
        """Run every later step eagerly."""
        self.decode_graphs = self.extend_graphs = None
        self.draft_graphs.clear()

    def run_planned(self, forward_batch: ForwardBatch) -> LogitsProcessorOutput:
        """The part of a step that a graph captures; its attention metadata is in place.

        A step that reads its lengths on the device is planned here; it writes them to ``forward_batch``'s tensors.
        """
        completed = self._complete(forward_batch)
        reads_lengths = forward_batch.kind is not None and forward_batch.kind.rows_per_request > 1
        if reads_lengths or forward_batch.bounds is not None:
            self.attn_backend.init_forward_metadata(completed)
        return self._run_model(completed)

    def _run_model(self, forward_batch: ForwardBatch) -> LogitsProcessorOutput:
        forward_batch.wants_hidden = self.relay is not None
        output: LogitsProcessorOutput = self.model(forward_batch.input_ids, forward_batch.positions, forward_batch)
        return output

    def _complete(self, forward_batch: ForwardBatch) -> ForwardBatch:
        """Add the ids that are on the device; writes the cache locations of these tokens to the request table.

        A step of several rows per request gets its rows placed, in the tensors of ``forward_batch``.
        """
        if forward_batch.input_ids is not None:
            return forward_batch
        assert forward_batch.kind is not None, (
            "only a step of one number of tokens per request finds its ids on the device"
        )
        rows, width = forward_batch.req_pool_indices, forward_batch.kind.rows_per_request
        completed = copy.copy(forward_batch)
        if width == 1:
            self.req_to_token_pool.write_step(rows, forward_batch.positions, forward_batch.out_cache_loc)
            completed.input_ids = self.last_token.index_select(0, rows)
            return completed
        assert self.relay is not None, f"a {forward_batch.kind.name} step needs lengths and drafts on the device"
        # The host gave slots from the last position on that it knows to be committed.
        positions, slots = forward_batch.positions.view(-1, width), forward_batch.table_loc
        if slots is None:
            slots = forward_batch.out_cache_loc.view(-1, width)
        else:
            positions = positions[:, :1] + self.relay.ahead[: slots.shape[1]]
        self.req_to_token_pool.write_step(rows, positions, slots)
        place_rows(completed, self.relay, self.req_to_token_pool)
        completed.input_ids = self.relay.tokens.index_select(0, rows).flatten()
        return completed

    @torch.inference_mode()
    def sample(self, step: StepForward, info: SamplingBatchInfo, batch: ModelWorkerBatch) -> torch.Tensor:
        """A token id for each row of logits, [rows]."""
        width = 1 if batch.kind is None else batch.kind.rows_per_request
        asked = [entry for entry in batch.logprobs for _ in range(width)]
        return self.sampler(
            step.output,
            info,
            return_logprob=bool(asked),
            top_logprobs_nums=[entry.top_k if entry else 0 for entry in asked],
            token_ids_logprobs=[entry.token_ids if entry else () for entry in asked],
            positions=None if info.is_all_greedy else step.drawn_positions,
        )

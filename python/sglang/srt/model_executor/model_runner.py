"""One rank's model: weights, pools, attention backend, and the forward and sampling of a step."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import get_parallel_state, get_tp_group, get_world_group
from sglang.srt.layers.attention import make_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionContext
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.moe.ep_moe.factory import describe_experts
from sglang.srt.layers.moe.slotted_mlp import describe_shared, fixed_form
from sglang.srt.layers.quantization import warn_of_splits
from sglang.srt.layers.sampler import Sampler
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardBatch, ModelWorkerBatch
from sglang.srt.model_executor.graph_check import CHECK_LENS, GraphCheck
from sglang.srt.model_executor.memory_plan import check_device
from sglang.srt.model_executor.model_pools import make_kv_pool, make_state_pool, plan_pools, table_width
from sglang.srt.model_executor.step_graphs import StepGraphs, decode_buckets
from sglang.srt.model_loader.loader import load_model
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.multi_stream_utils import trace_reader
from sglang.srt.utils.stream_policy import StreamPlan, plan_streams

logger = logging.getLogger(__name__)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class StepForward:
    """A forward that was queued: its output, and the step that ran, with the padding of a replayed graph.

    After a replayed graph both are valid until the next replay.
    """

    output: LogitsProcessorOutput
    fb: ForwardBatch
    batch_size: int

    @property
    def req_rows(self) -> torch.Tensor:
        """Request rows of the batch, [B]."""
        return self.fb.req_pool_indices[: self.batch_size]

    @property
    def drawn_positions(self) -> torch.Tensor:
        """Where in its sequence the token stands that is drawn from each row of logits, [rows]."""
        if self.fb.kind is None:
            return self.fb.seq_lens
        return self.fb.positions[: self.batch_size * self.fb.kind.rows_per_request] + 1


class ModelRunner:
    """Loads the model of this rank, sizes its pools from what is left, and runs steps.

    ``last_token`` [rows] int64 holds, by request row, the id that each request drew last, and ``drafts`` [rows, n] the
    guesses that follow it, where there are some: a step takes its input from there, so it can be queued before the host
    knows it.
    """

    def __init__(self, args: ServerArgs, model_config: ModelConfig) -> None:
        self.model_config = model_config
        self.args = args
        self.local_rank = get_parallel_state().local_rank
        current_platform.set_device(self.local_rank)
        self.device: torch.device = current_platform.device(self.local_rank)
        self.streams = plan_streams(args, *stream_needs(model_config, args))
        _tell(self.streams)
        if self.device.type == "cuda":
            check_device(args, model_config, current_platform.kind, current_platform.memory_info(self.local_rank)[0])
        self.model = load_model(model_config, args.load_format, self.device, args.random_seed or 0, self.streams)
        self._settle_streams()
        self.plain_by_split = warn_of_splits(self.model, get_world_group())
        self.overlap_trace = trace_reader(self.model)
        self.max_running_requests = _required(args.max_running_requests, "max_running_requests")
        self._make_pools()
        context = AttentionContext(
            model_config=model_config,
            req_to_token_pool=self.req_to_token_pool,
            kv_pool=self.kv_pool,
            state_pool=self.state_pool,
            page_size=self.page_size,
            device=self.device,
        )
        self.attn_backend = make_attention_backend(args.attention_backend, context)
        self.sampler = Sampler()
        self.last_token = torch.zeros(self.req_to_token_pool.padding_row + 1, dtype=torch.int64, device=self.device)
        self.drafts: torch.Tensor | None = None
        self.wants_hidden = False
        self.decode_graphs: StepGraphs | None = None
        if not args.disable_cuda_graph:
            self._capture_graphs()

    def _settle_streams(self) -> None:
        """What the loaded weights leave of the plan: a layout may leave the fused form only."""
        reason = fixed_form(self.model)
        if reason and not self.streams.fusion.enforced:
            told = self.streams
            self.streams = plan_streams(self.args, *stream_needs(self.model_config, self.args), must_fuse=reason)
            _tell(self.streams, told)

    def _make_pools(self) -> None:
        args, config = self.args, self.model_config
        tp_size = get_tp_group().size
        self.page_size = _required(args.page_size, "page_size")
        free, _ = current_platform.memory_info(self.local_rank)
        # Ranks take the same decisions only with pools of one size; ranks on the host share its memory.
        ranks_here = get_world_group().size * args.num_replicas if self.device.type == "cpu" else 1
        share = free * _required(args.mem_fraction_static, "mem_fraction_static") / ranks_here
        plan = plan_pools(args, config, tp_size, get_world_group().smallest(int(share)))
        self.pool_plan_lines = plan.lines
        for line in plan.lines:
            logger.info("%s", line)
        self.max_total_num_tokens = plan.num_tokens
        self.req_to_token_pool = ReqToTokenPool(self.max_running_requests, table_width(config), self.device)
        self.kv_pool = make_kv_pool(config, plan.num_tokens, self.page_size, tp_size, self.device)
        self.state_pool = make_state_pool(config, plan.num_state_slots, tp_size, self.device, args.mamba_ssm_dtype)

    @torch.inference_mode()
    def forward(self, batch: ModelWorkerBatch) -> StepForward:
        """Queue a step: logits of its rows, and the prompt log-probabilities asked for."""
        graphs = self.decode_graphs
        if graphs is not None and batch.kind == graphs.kind:
            # Under attention data parallelism the groups have agreed on it.
            agreed = batch.global_num_tokens is not None
            bucket = batch.graph_bucket if agreed else self.graph_bucket(batch.batch_size)
            if bucket is not None:
                return self._replay(batch, bucket)
        # A backend may plan from the request table, so that is complete first.
        fb = self._complete(ForwardBatch.from_worker_batch(batch, self.device, self.attn_backend))
        fb.wants_hidden = self.wants_hidden
        self.attn_backend.init_forward_metadata(fb)
        return StepForward(self._run_model(fb), fb, batch.batch_size)

    def _replay(self, batch: ModelWorkerBatch, bucket: int) -> StepForward:
        assert self.decode_graphs is not None
        fb, output = self.decode_graphs.replay(batch, bucket)
        assert isinstance(output, LogitsProcessorOutput)
        return StepForward(output, fb, batch.batch_size)

    def graph_bucket(self, batch_size: int) -> int | None:
        """The decode graph that takes so many requests, the same on every rank; None when they run eagerly."""
        return None if self.decode_graphs is None else self.decode_graphs.bucket_of(batch_size)

    def describe(self) -> dict[str, Any]:
        """What a server says of its model while it runs; msgpack-able."""
        streams = {**self.streams.describe(), "trace": self.overlap_trace()}
        experts = {**describe_experts(self.model), "shared": describe_shared(self.model)}
        return {"experts": experts, "streams": streams, "plain_by_split": self.plain_by_split}

    def _run_model(self, fb: ForwardBatch) -> LogitsProcessorOutput:
        output: LogitsProcessorOutput = self.model(fb.input_ids, fb.positions, fb)
        return output

    def _complete(self, fb: ForwardBatch) -> ForwardBatch:
        """``fb`` with the ids that only the device knows; the request table gets the slots of these tokens."""
        if fb.input_ids is not None:
            return fb
        assert fb.kind is not None, "only a step of one number of tokens per request finds its ids on the device"
        rows, width = fb.req_pool_indices, fb.kind.rows_per_request
        first = fb.positions if width == 1 else fb.positions.view(-1, width)[:, 0]
        slots = fb.out_cache_loc if width == 1 else fb.out_cache_loc.view(-1, width)
        self.req_to_token_pool.write_step(rows, first, slots if fb.table_loc is None else fb.table_loc)
        ids = self.last_token.index_select(0, rows)
        if width > 1:
            assert self.drafts is not None, f"a {fb.kind.name} step needs drafts on the device"
            ids = torch.cat([ids.unsqueeze(1), self.drafts.index_select(0, rows)], dim=1).flatten()
        return replace(fb, input_ids=ids)

    @torch.inference_mode()
    def _capture_graphs(self) -> None:
        """Record decode for every bucket, and prove each against the eager step."""
        args, backend = self.args, self.attn_backend
        largest = min(args.cuda_graph_max_bs or self.max_running_requests, self.max_running_requests)
        buckets = decode_buckets(largest, args.cuda_graph_bs)
        free_before, _ = current_platform.memory_info(self.local_rank)
        graphs = StepGraphs(
            kind=DECODE,
            forward=lambda fb: self._run_model(self._complete(fb)),
            backend=backend,
            buckets=buckets,
            max_context_len=self.model_config.context_len,
            device=self.device,
            padding_row=self.req_to_token_pool.padding_row,
            has_state=self.state_pool is not None,
            num_groups=get_parallel_state().attn_dp_size,
            world=get_world_group(),
        )
        with tqdm(total=len(buckets), desc="Capturing decode graphs", unit="graph") as bar:
            graphs.capture(current_platform.create_graph, lambda bucket: _advance(bar, bucket))
        free_after, _ = current_platform.memory_info(self.local_rank)
        logger.info("decode graphs %s took %.2f GB", buckets, max(0, free_before - free_after) / 1e9)
        self._prove_graphs(graphs, buckets[-1])
        self.decode_graphs = graphs

    def _prove_graphs(self, graphs: StepGraphs, max_bs: int) -> None:
        limit = min(self.kv_pool.size, max_bs * max(CHECK_LENS))
        buffers = [t.narrow(1, 0, limit + self.page_size) for t in self.kv_pool.buffers()]
        states = 0
        if self.state_pool is not None:
            states = min(self.state_pool.size, max_bs)
            buffers += [t.narrow(1, 0, states + 1) for t in self.state_pool.buffers()]

        def eager(batch: ModelWorkerBatch, bucket: int) -> LogitsProcessorOutput:
            graphs.buffers.fill(batch, bucket)
            fb = graphs.buffers.view(bucket, self.attn_backend, self.state_pool is not None, batch)
            self.attn_backend.init_forward_metadata_replay(fb)
            return self._run_model(self._complete(fb))

        GraphCheck(
            graphs,
            eager,
            self.last_token,
            self.req_to_token_pool,
            buffers,
            num_slots=limit,
            num_states=states,
            vocab_size=self.model_config.vocab_size,
            page_size=self.page_size,
        ).run()

    @torch.inference_mode()
    def sample(self, step: StepForward, info: SamplingBatchInfo, batch: ModelWorkerBatch) -> torch.Tensor:
        """A token id for each row of logits, [rows]."""
        return self.sampler(
            step.output,
            info,
            return_logprob=bool(batch.logprobs),
            top_logprobs_nums=[entry.top_k if entry else 0 for entry in batch.logprobs],
            token_ids_logprobs=[entry.token_ids if entry else () for entry in batch.logprobs],
            positions=step.drawn_positions,
        )


def stream_needs(config: ModelConfig, args: ServerArgs) -> tuple[str, tuple[str, ...]]:
    """What ``plan_streams`` asks of a model: what speaks against fusion, and the places that may overlap."""
    return config.shared_fusion_refusal(args.moe_a2a_backend), config.text.overlap_sites


def _tell(streams: StreamPlan, told: StreamPlan | None = None) -> None:
    """Log what differs from the plan that was ``told`` before; warnings on rank 0 alone."""
    lines, warnings = (told.lines(), told.warnings) if told is not None else ([], ())
    for line in streams.lines():
        if line not in lines:
            logger.info("%s", line)
    if get_world_group().rank == 0:
        for warning in streams.warnings:
            if warning not in warnings:
                logger.warning("%s", warning)


def _advance(bar: tqdm, bucket: int) -> None:
    bar.set_postfix(batch_size=bucket)
    bar.update()


def _required(value: Number | None, name: str) -> Number:
    if value is None:
        raise ValueError(f"server argument {name} is not resolved")
    return value

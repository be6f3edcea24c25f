"""Creates the runners of one rank: ``load`` each model, ``plan`` the memory that they share, ``build`` them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import torch

from sglang.srt.arg_groups.stream_policy import StreamPlan, plan_streams
from sglang.srt.configs.cache_layout import FULL
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import get_parallel_state, get_tp_group, get_world_group
from sglang.srt.layers.attention import make_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionContext
from sglang.srt.layers.moe.fused_shared_experts import fixed_form
from sglang.srt.layers.quantization import warn_of_splits
from sglang.srt.mem_cache.memory_pool import ModelPools
from sglang.srt.mem_cache.pool_plan import PoolPlan
from sglang.srt.model_executor.capture_lint import HostList
from sglang.srt.model_executor.extend_graphs import ExtendGraphs
from sglang.srt.model_executor.forward_batch_info import (
    DECODE,
    AttentionBackendLike,
    ForwardBatch,
    ModelWorkerBatch,
    StepKind,
)
from sglang.srt.model_executor.graph_check import ExtendCheck, GraphCheck
from sglang.srt.model_executor.memory_plan import check_fit, extend_graph_buckets, graph_buckets, plan_needs
from sglang.srt.model_executor.model_pools import RankMemory, make_pools, make_rank_memory, plan_pools
from sglang.srt.model_executor.model_runner import LoadedModel, ModelRunner
from sglang.srt.model_executor.step_graphs import StepGraphs
from sglang.srt.model_loader.loader import draft_config, load_draft_model, load_model
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpecInfo

logger = logging.getLogger(__name__)


def make_runner(args: ServerArgs, config: ModelConfig, needed: Mapping[str, int] | None = None) -> ModelRunner:
    """The runner of this rank's only model; ``needed`` as in ``load``. Raises PoolPlanError or WeightLoadError."""
    models = [load(args, config, needed)]
    return build(args, models, plan(args, models))[0]


def load(args: ServerArgs, config: ModelConfig, needed: Mapping[str, int] | None = None) -> LoadedModel:
    """This rank's model on its device, if it fits; needed: the launch's count (``RankNeeds.num_bytes``) or None."""
    local_rank = get_parallel_state().local_rank
    current_platform.set_device(local_rank)
    device: torch.device = current_platform.device(local_rank)
    streams = plan_streams(args, *stream_needs(config, args))
    _log_streams(streams)
    if device.type == "cuda":
        needed = needed or plan_needs(args, config, current_platform.kind, os.environ).num_bytes
        check_fit(current_platform.memory_info(local_rank)[0], needed)
    module = load_model(config, args.load_format, device, args.random_seed or 0, streams)
    # The layout of the loaded weights may allow only fused shared experts.
    reason = fixed_form(module)
    if reason and not streams.fusion.enforced:
        logged = streams
        streams = plan_streams(args, *stream_needs(config, args), must_fuse=reason)
        _log_streams(streams, logged)
    draft = None
    if args.speculative_algorithm:
        draft = load_draft_model(draft_config(args, config), args, module, device, streams)
    return LoadedModel(config, module, device, streams, warn_of_splits(module, get_world_group()), draft)


def plan(args: ServerArgs, models: Sequence[LoadedModel]) -> PoolPlan:
    """Sizes of all ``models``' pools in memory left by weights, the same on each rank. Raises PoolPlanError."""
    device, world = models[0].device, get_world_group()
    free, _ = current_platform.memory_info(get_parallel_state().local_rank)
    # Ranks make the same decisions only with pools of the same size; ranks on the host share its memory.
    ranks_here = world.size * args.num_replicas if device.type == "cpu" else 1
    if args.mem_fraction_static is None:
        raise ValueError("server argument mem_fraction_static is not resolved")
    share = free * args.mem_fraction_static / ranks_here
    sizes = plan_pools(args, [model.config for model in models], get_tp_group().size, world.smallest(int(share)))
    for line in sizes.lines:
        logger.info("%s", line)
    return sizes


def build(args: ServerArgs, models: Sequence[LoadedModel], sizes: PoolPlan) -> list[ModelRunner]:
    """One runner per model, over pools of ``sizes`` and one request table; decode steps are captured and checked."""
    pools = [make_pools(args, model.config, sizes, get_tp_group().size, model.device) for model in models]
    memory = make_rank_memory(args, [model.config for model in models], sizes, pools, models[0].device)
    runners = []
    for model, each in zip(models, pools, strict=True):
        runners.append(ModelRunner(model, memory, each, make_backend(args, model, memory, each)))
    if not args.disable_cuda_graph:
        spec = SpecInfo.of(args.speculative_num_steps)
        for runner in runners:
            extends = extend_graph_buckets(args)
            if extends and runner.attn_backend.plans_bounds:
                # The largest steps first, so that the others fit their memory.
                runner.extend_graphs = capture_extend_graphs(runner, extends)
                prove_extend_graphs(runner, runner.extend_graphs)
            # With drafts there are only verify steps, no decode steps.
            kind = DECODE if spec is None else spec.verify
            runner.decode_graphs = capture_graphs(runner, graph_buckets(args), kind)
            prove_graphs(runner, runner.decode_graphs)
    return runners


def make_backend(args: ServerArgs, model: LoadedModel, memory: RankMemory, pools: ModelPools) -> AttentionBackendLike:
    """The attention backend for the layers of ``model``, over its own ``pools``."""
    if args.attention_backend is None:
        raise ValueError("server argument attention_backend is not resolved")
    return make_attention_backend(args.attention_backend, attention_context(model, memory, pools))


def attention_context(model: LoadedModel, memory: RankMemory, pools: ModelPools) -> AttentionContext:
    """What attention backends of ``model`` work on."""
    window_pages = None if memory.window is None else memory.window.table
    return AttentionContext(model.config, memory.req_to_token_pool, pools, model.device, window_pages)


@torch.inference_mode()
def capture_graphs(runner: ModelRunner, buckets: Sequence[int], kind: StepKind = DECODE) -> StepGraphs:
    """The steps of ``kind`` captured for every batch bucket; not yet checked, and not yet used by the runner."""
    graphs = StepGraphs(
        kind=kind,
        forward=runner.run_planned,
        backend=runner.attn_backend,
        buckets=buckets,
        max_context_len=runner.model_config.context_len,
        device=runner.device,
        padding_row=runner.req_to_token_pool.padding_row,
        has_state=runner.has_state,
        num_groups=get_parallel_state().attn_dp_size,
        world=get_world_group(),
    )
    _capture(graphs)
    return graphs


def _capture(graphs: StepGraphs | ExtendGraphs) -> None:
    """Capture all, and log the memory that it took."""
    local_rank = get_parallel_state().local_rank
    free_before, _ = current_platform.memory_info(local_rank)
    graphs.capture(current_platform.create_graph)
    free_after, _ = current_platform.memory_info(local_rank)
    logger.info("%s graphs %s took %.2f GB", graphs.name, graphs.buckets, (free_before - free_after) / 1e9)


@torch.inference_mode()
def prove_graphs(runner: ModelRunner, graphs: StepGraphs) -> None:
    """Refuse each captured bucket whose replay differs from the eager step; the pools must be empty, and stay so."""
    width = graphs.kind.rows_per_request

    def eager(batch: ModelWorkerBatch, bucket: int) -> tuple[torch.Tensor, ...]:
        forward_batch = graphs.fill(batch, bucket)
        # Planned like the captured step, which has no host lengths, so that sums are split in the same way.
        forward_batch.seq_lens_cpu = HostList(forward_batch.seq_lens_cpu)
        output = runner.run_planned(forward_batch).first(batch.batch_size * width)
        return (*output.tensors(), *left_by(forward_batch, batch.batch_size))

    def replay(batch: ModelWorkerBatch, bucket: int) -> tuple[torch.Tensor, ...]:
        forward_batch, output = graphs.replay(batch, bucket)
        return (*output.tensors(), *left_by(forward_batch, batch.batch_size))

    def left_by(forward_batch: ForwardBatch, size: int) -> tuple[torch.Tensor, ...]:
        """The rows of the step, from which drafts and the next step's lengths follow."""
        rows = size * width
        return (
            forward_batch.seq_lens[:size].clone(),
            forward_batch.positions[:rows].clone(),
            forward_batch.out_cache_loc[:rows].clone(),
        )

    vocab_size = runner.model_config.vocab_size
    GraphCheck(graphs, graphs.kind, eager, replay, runner.memory, runner.pools, vocab_size).run()


@torch.inference_mode()
def capture_extend_graphs(runner: ModelRunner, buckets: Sequence[int]) -> ExtendGraphs:
    """Extend steps captured for these numbers of tokens, of which no step has more than the pools; not yet checked."""
    buckets = [size for size in buckets if size <= runner.pools.size(FULL)] or [runner.pools.size(FULL)]
    graphs = ExtendGraphs(
        forward=runner.run_planned,
        backend=runner.attn_backend,
        buckets=buckets,
        max_requests=runner.req_to_token_pool.size,
        max_context_len=runner.model_config.context_len,
        device=runner.device,
        padding_row=runner.req_to_token_pool.padding_row,
        has_state=runner.has_state,
        world=get_world_group(),
    )
    _capture(graphs)
    return graphs


@torch.inference_mode()
def prove_extend_graphs(runner: ModelRunner, graphs: ExtendGraphs) -> None:
    """See ``prove_graphs``."""

    def eager(batch: ModelWorkerBatch, bucket: int) -> tuple[torch.Tensor, ...]:
        return graphs.own_output(runner.run_planned(graphs.fill(batch, bucket)), batch).tensors()

    def replay(batch: ModelWorkerBatch, bucket: int) -> tuple[torch.Tensor, ...]:
        return graphs.replay(batch, bucket)[1].tensors()

    ExtendCheck(graphs, eager, replay, runner.memory, runner.pools, runner.model_config.vocab_size).run()


def stream_needs(config: ModelConfig, args: ServerArgs) -> tuple[str, tuple[str, ...]]:
    """What ``plan_streams`` needs to know of a model: why it cannot fuse, and the sites that may overlap."""
    return config.shared_fusion_refusal(args.moe_a2a_backend), config.text.overlap_sites


def _log_streams(streams: StreamPlan, logged: StreamPlan | None = None) -> None:
    """Log what differs from the plan ``logged`` that was logged before; warnings only on rank 0."""
    lines, warnings = (logged.lines(), logged.warnings) if logged is not None else ([], ())
    for line in streams.lines():
        if line not in lines:
            logger.info("%s", line)
    if get_world_group().rank == 0:
        for warning in streams.warnings:
            if warning not in warnings:
                logger.warning("%s", warning)

"""Where the memory of one rank goes, computed from settings and config.json alone: ``python -m sglang.plan``.

Weights are counted on the model itself, built without contents; pools by the functions that size them at start-up;
exchange buffers as their owners allocate them. Graphs and the runtime's own memory are estimates and named so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sglang.srt.configs.cache_layout import STATE, CacheLayout, dummy_units
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState, ProcessGroupHandle, override_parallel_state
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.base import EpConfig
from sglang.srt.layers.moe.token_dispatcher.capacity import plan_rounds, rows_of_ranks
from sglang.srt.layers.moe.token_dispatcher.config import MoriConfig
from sglang.srt.layers.moe.token_dispatcher.mori_memory import ExchangeBuffer, HeapPlan, exchange_buffers, plan_heap
from sglang.srt.layers.moe.token_dispatcher.mori_plan import (
    INTRA_NODE,
    MORI_KERNELS,
    MoriKernel,
    choose_kernel,
    plan_exchange,
)
from sglang.srt.layers.moe.token_dispatcher.moriep import release_problem
from sglang.srt.mem_cache.pool_plan import PoolPlan, PoolPlanError
from sglang.srt.model_executor.extend_graphs import DEFAULT_MAX_TOKENS, extend_buckets
from sglang.srt.model_executor.model_pools import plan_pools, request_table_bytes, served_layout
from sglang.srt.model_executor.step_graphs import decode_buckets
from sglang.srt.model_loader.loader import build_draft_model, build_model, draft_config
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.server_args import ServerArgs, override_server_args

GIB = 1 << 30
# Estimates, measured on no AMD device: driver, collectives and compiled kernels of a process; one layer of one graph.
RUNTIME_BYTES, GRAPH_LAYER_BYTES = 2 * GIB, 256 << 10
# Group of weights -> names on the path of its modules; the first that matches counts.
WEIGHT_GROUPS = {
    "routed experts": {"experts"},
    "shared experts": {"shared_experts", "shared_expert"},
    "attention": {"self_attn", "linear_attn"},
    "router": {"gate", "shared_expert_gate", "topk"},
    "dense MLP": {"mlp"},
    "embedding and head": {"embed_tokens", "lm_head"},
    "hyper-connections": {"hc_attn", "hc_ffn", "hc_head"},
    "norms": {""},
}
# One more group: what the model that drafts has of its own.
DRAFT_LAYER = "draft layer"


def build_rank(args: ServerArgs, config: ModelConfig, rank: int) -> tuple[nn.Module, nn.Module | None]:
    """The model of ``rank``, and its draft model, on torch's meta device, without an exchange of experts."""
    tp_size = args.tp_size // args.attn_dp_size
    tp = ProcessGroupHandle(rank % tp_size, tp_size)
    state = ParallelState(ProcessGroupHandle(rank, args.tp_size), tp, args.ep_size)
    with override_parallel_state(state), override_server_args(**{**vars(args), "moe_a2a_backend": "none"}):
        with override_platform(CpuPlatform()):
            model = build_model(config, "meta")
            if args.speculative_algorithm is None:
                return model, None
            config = draft_config(args, config)
            # Which matrices are 8-bit stands in the tensors alone; without them the config is believed.
            there = any(Path(config.model_path).glob("*.safetensors"))
            return model, build_draft_model(config, model, "meta", load_format=args.load_format if there else "dummy")


def count_weights(model: nn.Module, draft: nn.Module | None = None) -> dict[str, int]:
    """Bytes of weights by group, with scales and position tables; ``draft``'s own are one more group."""
    groups = dict.fromkeys((*WEIGHT_GROUPS, DRAFT_LAYER), 0)
    seen: set[int] = set()
    modules = [*model.named_modules(), *((DRAFT_LAYER, module) for module in (draft.modules() if draft else ()))]
    for path, module in modules:
        parts = {"", *path.split(".")}
        group = path if path == DRAFT_LAYER else next(name for name, marks in WEIGHT_GROUPS.items() if parts & marks)
        for held in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(held, torch.Tensor) and held.untyped_storage()._cdata not in seen:
                seen.add(held.untyped_storage()._cdata)
                groups[group] += held.untyped_storage().nbytes()
    return {name: size for name, size in groups.items() if size}


@dataclass(frozen=True)
class StepRounds:
    """MoE rounds of one kind of step when every attention group brings ``rows`` and all may go to one rank."""

    step: str
    rows: int
    worst_case: int
    with_cap: int


@dataclass(frozen=True)
class KernelBuffers:
    """The buffers of one kernel when any number of rows may arrive, and under the receive cap."""

    worst_case: tuple[ExchangeBuffer, ...]
    with_cap: tuple[ExchangeBuffer, ...]


@dataclass(frozen=True)
class ExchangePlan:
    """What the exchange of tokens between expert ranks takes on one rank.

    ``kernel`` of ``by_kernel`` is the one that these settings choose, "portable" (alone) off HIP; ``recv_rows`` are
    those of the receive buffer. ``problems`` are reasons against the settings.
    """

    kernel: str
    recv_rows: int
    worst_recv_rows: int
    by_kernel: dict[str, KernelBuffers]
    heap: HeapPlan | None
    rounds: tuple[StepRounds, ...]
    problems: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Device memory in bytes: the whole heap, and buffers outside it."""
        beside = sum(buffer.num_bytes for buffer in self.by_kernel[self.kernel].with_cap if not buffer.on_heap)
        return beside + (self.heap.size if self.heap is not None else 0)


@dataclass(frozen=True)
class RankNeeds:
    """What the fullest rank holds in addition to its pools: weights in bytes by group, and the exchange between
    experts."""

    weights: dict[str, int]
    exchange: ExchangePlan | None

    @property
    def num_bytes(self) -> dict[str, int]:
        """All of it, by what it is for."""
        return {**self.weights, "MoE exchange": 0 if self.exchange is None else self.exchange.num_bytes}


def plan_needs(
    args: ServerArgs, config: ModelConfig, kind: str, environ: Mapping[str, str], check_release: bool = False
) -> RankNeeds:
    """The needs of resolved ``args`` on platform ``kind``; parameters and errors are those of ``plan_moe_exchange``."""
    model, draft = build_rank(args, config, 0)
    weights = [count_weights(model, draft)]
    if config.quant_config is not None:
        # Ranks differ where only some parts of a quantised matrix are cut at blocks.
        weights += [count_weights(*build_rank(args, config, rank)) for rank in range(1, args.tp_size)]
    fullest = max(weights, key=lambda groups: sum(groups.values()))
    models = [model] if draft is None else [model, draft]
    return RankNeeds(fullest, plan_moe_exchange(args, config, models, kind, environ, check_release))


def plan_moe_exchange(
    args: ServerArgs,
    config: ModelConfig,
    models: Sequence[nn.Module],
    kind: str,
    environ: Mapping[str, str],
    check_release: bool = False,
) -> ExchangePlan | None:
    """The exchange of resolved ``args`` on platform ``kind``; None where experts exchange no tokens.

    models: those of a rank by ``build_rank``. check_release: the MORI that can be imported here, if any, is one of the
    reasons. Raises ValueError for SGLANG_MORI_* and other settings with which there is nothing to plan.
    """
    if args.moe_a2a_backend != "mori":
        return None
    settings = MoriConfig.from_env(args.tp_size, low_latency=args.deepep_mode == "low_latency")
    layers = [module for model in models for module in model.modules() if isinstance(module, FusedMoE)]
    chosen = choose_kernel(settings) if kind == "hip" else None
    # Layers of one shape and type of rows share one exchange.
    kinds = dict.fromkeys((e.num_experts, e.hidden, e.top_k, config.dtype, e.quant_method.row_dtype) for e in layers)

    def sizes_of(kernel: MoriKernel | None, cap: int) -> list[EpConfig]:
        return [plan_exchange(replace(settings, max_recv_tokens=cap), kernel, 0, *each) for each in kinds]

    def buffers_of(kernel: MoriKernel | None, cap: int) -> tuple[ExchangeBuffer, ...]:
        name = "portable" if kernel is None else kernel.name
        sizes = sizes_of(kernel, cap)
        return tuple(buffer for each in sizes for buffer in exchange_buffers(each, name, settings.combine_groups))

    cap = settings.max_recv_tokens
    buffers = {}
    for each in MORI_KERNELS if kind == "hip" else (None,):
        # A kernel that is listed for comparison alone may need a larger cap than the one chosen.
        least = settings.world_size if cap and each is INTRA_NODE else 0
        buffers["portable" if each is None else each.name] = KernelBuffers(
            buffers_of(each, 0), buffers_of(each, max(cap, least))
        )
    name = "portable" if chosen is None else chosen.name
    heap = plan_heap(buffers[name].with_cap, environ) if kind == "hip" else None
    problems = (heap.problem,) if heap is not None and heap.problem else ()
    worst, capped = sizes_of(chosen, 0)[0], sizes_of(chosen, cap)[0]
    if check_release and chosen is not None and (problem := release_problem(capped, chosen)):
        problems = (*problems, problem)
    return ExchangePlan(name, capped.max_recv, worst.max_recv, buffers, heap, plan_steps(args, worst, capped), problems)


def plan_steps(args: ServerArgs, *exchanges: EpConfig) -> tuple[StepRounds, ...]:
    """Rounds of the largest steps that these settings allow, by an exchange without and by one with the receive cap."""
    running, chunk = args.max_running_requests or 1, args.chunked_prefill_size or 0
    # With drafts requests continue by verify steps, of several rows each.
    kind, width = ("decode", 1) if args.speculative_algorithm is None else ("verify", args.speculative_num_draft_tokens)
    assert width is not None, "resolved arguments say how many"
    steps = {kind: running * width, "prefill chunk": chunk + (running if args.enable_mixed_chunk else 0)}
    if not args.disable_cuda_graph:
        steps[f"{kind} graph"] = graph_buckets(args)[-1] * width
    plans = []
    for step, rows in steps.items():
        brought = rows_of_ranks([rows] * args.attn_dp_size, args.tp_size // args.attn_dp_size)
        worst, capped = (len(plan_rounds(brought, e.max_recv, e.max_num_inp_token_per_rank)) for e in exchanges)
        plans.append(StepRounds(step, rows, worst, capped))
    return tuple(plans)


def graph_buckets(args: ServerArgs) -> list[int]:
    """Batch sizes that decode is captured for."""
    running = args.max_running_requests or 1
    return decode_buckets(min(args.cuda_graph_max_bs or running, running), args.cuda_graph_bs)


def extend_graph_buckets(args: ServerArgs) -> list[int]:
    """Numbers of tokens that extend steps are captured for; none where that is off, or where ranks' steps differ."""
    if args.disable_cuda_graph or args.disable_piecewise_cuda_graph:
        return []
    if args.steps_differ:
        return []
    sizes, chunk = args.piecewise_cuda_graph_tokens, args.chunked_prefill_size or 0
    most = args.piecewise_cuda_graph_max_tokens or max(sizes or [DEFAULT_MAX_TOKENS])
    return extend_buckets(min(most, chunk) if chunk > 0 else most, sizes)


def estimate_graphs(args: ServerArgs, config: ModelConfig) -> int:
    """Bytes that captured steps may take: activations and logits of the largest, and the nodes of each graph."""
    if args.disable_cuda_graph:
        return 0
    buckets, text = graph_buckets(args), config.text
    values = 8 * text.hidden_size + text.num_experts_per_tok * (text.hidden_size + 3 * text.moe_intermediate_size)
    rows = buckets[-1] * args.attn_dp_size * (args.speculative_num_draft_tokens or 1)
    logits = rows * 2 * 4 * config.vocab_size
    extends = extend_graph_buckets(args)
    rows = max([rows, *extends])
    # The model's step, the draft layer's step, and the chain of drafts twice: greedy and sampled.
    steps = args.speculative_num_steps
    layers = config.num_hidden_layers + (0 if steps is None else 1 + 2 * (steps - 1))
    graphs = len(buckets) * layers + len(extends) * config.num_hidden_layers
    return rows * values * config.dtype.itemsize + logits + graphs * GRAPH_LAYER_BYTES


@dataclass(frozen=True)
class UnitPlan:
    """What is kept by one kind of unit: how many can be handed out, bytes of each page, and of all with the dummies.

    A page of ``page_size`` units is handed out at a time; ``parts`` and ``rows`` are its bytes and rows by pool.
    """

    size: int
    page_size: int
    page_bytes: int
    num_bytes: int
    parts: dict[str, int]
    rows: dict[str, int]


@dataclass(frozen=True)
class MemoryPlan:
    """One rank's memory in bytes, by unit; ``pools`` None: nothing is left for them, as ``problems`` says."""

    memory: int
    weights: dict[str, int]
    exchange: ExchangePlan | None
    runtime_estimate: int
    graphs_estimate: int
    request_table_bytes: int
    units: dict[str, UnitPlan]
    pools: PoolPlan | None
    problems: tuple[str, ...]

    @property
    def exchange_bytes(self) -> int:
        return 0 if self.exchange is None else self.exchange.num_bytes

    @property
    def left(self) -> int:
        """What remains for activations; negative when the settings do not fit."""
        pools = self.request_table_bytes + sum(unit.num_bytes for unit in self.units.values())
        estimates = self.runtime_estimate + self.graphs_estimate
        return self.memory - sum(self.weights.values()) - self.exchange_bytes - estimates - pools


def plan_memory(
    args: ServerArgs, config: ModelConfig, kind: str, memory: int, environ: Mapping[str, str]
) -> MemoryPlan:
    """The plan of the fullest rank of resolved ``args`` on a device of platform ``kind`` with ``memory`` bytes."""
    needs = plan_needs(args, config, kind, environ, check_release=True)
    weights, exchange, needed = needs.weights, needs.exchange, needs.num_bytes
    problems = [] if exchange is None else [*exchange.problems]
    tp_size = args.tp_size // args.attn_dp_size
    runtime = 0 if kind == "cpu" else RUNTIME_BYTES
    pools = None
    try:
        check_fit(memory - runtime, needed)
        free = memory - runtime - sum(needed.values())
        pools = plan_pools(args, [config], tp_size, int(free * (args.mem_fraction_static or 1)))
    except PoolPlanError as error:
        problems.append(str(error))
    return MemoryPlan(
        memory,
        weights,
        exchange,
        runtime_estimate=runtime,
        graphs_estimate=estimate_graphs(args, config),
        request_table_bytes=request_table_bytes(args, [config]),
        units=plan_units(args, served_layout(args, config, tp_size), pools),
        pools=pools,
        problems=tuple(problems),
    )


def plan_units(args: ServerArgs, layout: CacheLayout, pools: PoolPlan | None) -> dict[str, UnitPlan]:
    """What the pools that follow each unit take; nothing where ``pools`` could not be sized."""
    units = {}
    for unit in layout.units:
        page = 1 if unit == STATE else args.page_size or 1
        size = 0 if pools is None else pools.sizes[unit]
        num_bytes = 0 if pools is None else layout.num_bytes(unit, size + dummy_units(unit, page))
        held = [pool for pool in layout.pools if pool.unit == unit]
        parts = {pool.name: page // pool.units_per_row * pool.row_bytes for pool in held}
        rows = {pool.name: page // pool.units_per_row * pool.packed_rows for pool in held}
        units[unit] = UnitPlan(size, page, layout.num_bytes(unit, page), num_bytes, parts, rows)
    return units


def check_fit(free: int, parts: Mapping[str, int]) -> None:
    """Raise PoolPlanError, with the sum spelled out, unless ``parts`` (RankNeeds.num_bytes) leave some of ``free``."""
    total = sum(parts.values())
    if total >= free:
        terms = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items() if size)
        raise PoolPlanError(
            f"a rank needs {total / GIB:.2f} GiB before any KV ({terms}), and {free / GIB:.2f} GiB are there: raise "
            "--tp-size, serve a smaller or quantised model, or lower SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
        )

"""The pools that a model needs on one rank: layout, sizes and creation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.srt.configs.cache_layout import FULL, STATE, SWA, CacheLayout, CacheTypes, join
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.memory_pool import ModelPools, StateSlots
from sglang.srt.mem_cache.pool_plan import PoolPlan, PoolPlanError, plan_pool_sizes
from sglang.srt.mem_cache.window_pages import WindowPages
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.spec_info import SpecInfo

# One live state per running request, and three times as many for snapshots of the prefix cache, if memory allows.
STATE_SLOTS_PER_REQUEST = 4
# What all running requests can hold, and the same again for the prefix cache.
CONTEXTS_PER_REQUEST = 2


@dataclass(frozen=True)
class StepRelay:
    """What a step with several tokens per request leaves on the device for the next step, by request row.

    ``committed`` [rows] int64 are the tokens that have KV; ``tokens`` [rows, n + 1] int64 the newest token, and the
    draft tokens after it. Both are 0 in the padding row. ``ahead`` [2 n] int64 counts from 0: the slots of a step.
    """

    committed: torch.Tensor
    tokens: torch.Tensor
    ahead: torch.Tensor

    @classmethod
    def make(cls, num_rows: int, num_steps: int, device: torch.device) -> StepRelay:
        """For requests in ``num_rows`` rows, with ``num_steps`` draft tokens each."""
        tokens = torch.zeros(num_rows, num_steps + 1, dtype=torch.int64, device=device)
        return cls(torch.zeros_like(tokens[:, 0]), tokens, torch.arange(2 * num_steps, device=device))

    @property
    def drafts(self) -> torch.Tensor:
        """The draft tokens, [rows, n]."""
        return self.tokens[:, 1:]


@dataclass(frozen=True)
class RankMemory:
    """What all runners of a rank share: the sizes of their pools, the request table, and the data of its rows.

    ``last_token`` [rows] int64 holds, by request row, the id that each request sampled last. ``state_slots`` is None if
    no model has recurrent states, ``window`` if none has a window, ``relay`` without drafts.
    """

    sizes: PoolPlan
    page_size: int
    req_to_token_pool: ReqToTokenPool
    last_token: torch.Tensor
    state_slots: StateSlots | None
    window: WindowPages | None = None
    relay: StepRelay | None = None


def cache_layout(
    config: ModelConfig, tp_size: int, ssm_dtype: str | None = None, num_draft_tokens: int = 0
) -> CacheLayout:
    """The cache layout of one of ``tp_size`` ranks; ``ssm_dtype`` names the type of recurrent states, None the
    checkpoint's.

    With ``num_draft_tokens`` rows per verify step, the layout includes what these need, and the draft layer.
    """
    activations = _name(config.dtype)
    conv = envs.SGLANG_MAMBA_CONV_DTYPE.get() or activations
    types = CacheTypes(kv=_name(kv_dtype(config)), conv=conv, state=ssm_dtype, inputs=activations)
    layout: CacheLayout = config.text.cache_layout(tp_size, types, num_draft_tokens)
    return join([layout, config.text.draft_layout(tp_size, types)]) if num_draft_tokens else layout


def served_layout(args: ServerArgs, config: ModelConfig, tp_size: int) -> CacheLayout:
    """The cache layout of one of ``tp_size`` ranks, by the resolved ``args``."""
    return cache_layout(config, tp_size, args.mamba_ssm_dtype, args.speculative_num_draft_tokens or 0)


def plan_pools(args: ServerArgs, configs: Sequence[ModelConfig], tp_size: int, available_bytes: int) -> PoolPlan:
    """Pools of one rank that serves all ``configs`` at once, in ``available_bytes``. Raises PoolPlanError."""
    if args.max_running_requests is None or args.page_size is None:
        raise ValueError("server arguments max_running_requests and page_size are not resolved")
    longest = max(config.context_len for config in configs)
    sizes = plan_pool_sizes(
        available_bytes=available_bytes,
        layout=join(served_layout(args, config, tp_size) for config in configs),
        max_running_requests=args.max_running_requests,
        page_size=args.page_size,
        request_table_bytes=request_table_bytes(args, configs),
        max_total_tokens=args.max_total_tokens,
        max_mamba_cache_size=args.max_mamba_cache_size,
        disable_radix_cache=args.disable_radix_cache,
        useful_tokens=CONTEXTS_PER_REQUEST * args.max_running_requests * longest,
        useful_state_slots=STATE_SLOTS_PER_REQUEST * args.max_running_requests,
        swa_full_tokens_ratio=args.swa_full_tokens_ratio,
        useful_step_tokens=max(args.chunked_prefill_size or 0, 0) or args.max_prefill_tokens,
    )
    least = 2 + slots_for_drafts(args)
    if sizes.sizes[FULL] < least:
        raise PoolPlanError(
            f"there is KV for {sizes.sizes[FULL]} tokens, and a request of one prompt token and one new one needs "
            f"{least} with --speculative-num-steps {args.speculative_num_steps}: raise --max-total-tokens, lower "
            "--speculative-num-steps or --page-size, or free memory"
        )
    return sizes


def slots_for_drafts(args: ServerArgs) -> int:
    """Tokens, in whole pages, that a verify step may take past the end of a request."""
    spec, page = SpecInfo.of(args.speculative_num_steps), args.page_size or 1
    # The last step starts two tokens before the end, or earlier.
    return 0 if spec is None else -(-(spec.slots_per_step - 2) // page) * page


def make_rank_memory(
    args: ServerArgs, configs: Sequence[ModelConfig], sizes: PoolPlan, pools: Sequence[ModelPools], device: torch.device
) -> RankMemory:
    """The request table of the models of ``configs``, and the allocators of the other units of ``pools``, of
    ``sizes``."""
    table = ReqToTokenPool(args.max_running_requests or 1, table_width(args, configs), device)
    state_slots = StateSlots(*pools) if any(each.layout.has(STATE) for each in pools) else None
    window = None
    if SWA in sizes.sizes:
        page = args.page_size or 1
        window = WindowPages(sizes.sizes[FULL] // page, sizes.sizes[SWA] // page, page, device)
    num_rows, relay = table.padding_row + 1, None
    last_token = torch.zeros(num_rows, dtype=torch.int64, device=device)
    if args.speculative_num_steps is not None:
        relay = StepRelay.make(num_rows, args.speculative_num_steps, device)
        last_token = relay.tokens[:, 0]
    return RankMemory(sizes, args.page_size or 1, table, last_token, state_slots, window, relay)


def make_pools(
    args: ServerArgs, config: ModelConfig, sizes: PoolPlan, tp_size: int, device: torch.device
) -> ModelPools:
    """The pools of one model on one rank."""
    return ModelPools(served_layout(args, config, tp_size), sizes.sizes, args.page_size or 1, device)


def table_width(args: ServerArgs, configs: Sequence[ModelConfig]) -> int:
    """Columns of the request table: the longest context, and positions that a step may use past it."""
    spec = SpecInfo.of(args.speculative_num_steps)
    past = 1 if spec is None else spec.slots_per_step
    return max(config.context_len for config in configs) + past


def request_table_bytes(args: ServerArgs, configs: Sequence[ModelConfig]) -> int:
    """Bytes of the device's table from requests' positions to KV slots."""
    return ReqToTokenPool.num_bytes(args.max_running_requests or 1, table_width(args, configs))


def kv_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype of cached keys, values and latents: ``--kv-cache-dtype``."""
    if config.kv_cache_dtype == "fp8_e4m3":
        return fp8_dtype(current_platform.arch)
    return torch.bfloat16 if config.kv_cache_dtype == "bfloat16" else config.dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

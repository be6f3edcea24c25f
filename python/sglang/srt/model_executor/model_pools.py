"""The pools that a model needs on one rank: their shapes, their bytes, and the making of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang.kernels.ops.quant.group_fp8 import fp8_dtype
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.qwen3_5 import Qwen3_5Config
from sglang.srt.environ import envs
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.memory_pool import GDNStatePool, KVPool, MHATokenToKVPool, MLATokenToKVPool, ModelPools
from sglang.srt.mem_cache.pool_plan import PoolPlan, plan_pool_sizes
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs

# One live state a running request, and as many again thrice for snapshots of the prefix cache, unless memory is short.
STATE_SLOTS_PER_REQUEST = 4
# What all running requests can hold, and as much again for the prefix cache.
CONTEXTS_PER_REQUEST = 2


@dataclass(frozen=True)
class RankMemory:
    """What all runners of a rank share: the sizes of their pools, the request table, and what belongs to its rows.

    ``last_token`` [rows] int64 holds, by request row, the id that each request drew last.
    """

    sizes: PoolPlan
    page_size: int
    req_to_token_pool: ReqToTokenPool
    last_token: torch.Tensor


def plan_pools(args: ServerArgs, configs: Sequence[ModelConfig], tp_size: int, available_bytes: int) -> PoolPlan:
    """The pools of one rank, which serves all ``configs`` at once, for ``available_bytes``, by the resolved ``args``.

    A token takes a row in the pools of every model, and so does a state slot. Raises PoolPlanError.
    """
    if args.max_running_requests is None or args.page_size is None:
        raise ValueError("server arguments max_running_requests and page_size are not resolved")
    longest = max(config.context_len for config in configs)
    return plan_pool_sizes(
        available_bytes=available_bytes,
        bytes_per_token=sum(kv_bytes_per_token(config, tp_size) for config in configs),
        max_running_requests=args.max_running_requests,
        page_size=args.page_size,
        request_table_bytes=request_table_bytes(args, configs),
        bytes_per_state_slot=sum(state_bytes_per_slot(config, tp_size, args.mamba_ssm_dtype) for config in configs),
        max_total_tokens=args.max_total_tokens,
        max_mamba_cache_size=args.max_mamba_cache_size,
        disable_radix_cache=args.disable_radix_cache,
        useful_tokens=CONTEXTS_PER_REQUEST * args.max_running_requests * longest,
        useful_state_slots=STATE_SLOTS_PER_REQUEST * args.max_running_requests,
    )


def make_rank_memory(
    args: ServerArgs, configs: Sequence[ModelConfig], sizes: PoolPlan, device: torch.device
) -> RankMemory:
    """The request table of the models of ``configs``, whose pools get ``sizes``."""
    table = ReqToTokenPool(args.max_running_requests or 1, table_width(configs), device)
    last_token = torch.zeros(table.padding_row + 1, dtype=torch.int64, device=device)
    return RankMemory(sizes, args.page_size or 1, table, last_token)


def make_pools(
    args: ServerArgs, config: ModelConfig, sizes: PoolPlan, tp_size: int, device: torch.device
) -> ModelPools:
    """The pools of one model on one rank."""
    return ModelPools(
        make_kv_pool(config, sizes.num_tokens, args.page_size or 1, tp_size, device),
        make_state_pool(config, sizes.num_state_slots, tp_size, device, args.mamba_ssm_dtype),
    )


def table_width(configs: Sequence[ModelConfig]) -> int:
    """Positions of a row of the request table: the longest context, and a column past it."""
    return max(config.context_len for config in configs) + 1


def request_table_bytes(args: ServerArgs, configs: Sequence[ModelConfig]) -> int:
    """Bytes of the device's table from requests' positions to KV slots."""
    return ReqToTokenPool.num_bytes(args.max_running_requests or 1, table_width(configs))


def kv_dtype(config: ModelConfig) -> torch.dtype:
    """What keys, values and latents are kept in: ``--kv-cache-dtype``."""
    if config.kv_cache_dtype == "fp8_e4m3":
        return fp8_dtype(current_platform.arch)
    return torch.bfloat16 if config.kv_cache_dtype == "bfloat16" else config.dtype


def kv_bytes_per_token(config: ModelConfig, tp_size: int) -> int:
    """Bytes of one token in all layers of one rank; a latent is held whole by every rank."""
    return make_kv_pool(config, 1, 1, tp_size, torch.device("meta")).row_bytes()


def make_kv_pool(config: ModelConfig, num_tokens: int, page_size: int, tp_size: int, device: torch.device) -> KVPool:
    """The KV pool of one rank for ``num_tokens`` tokens."""
    text = config.text
    if isinstance(text, DeepseekConfig):
        layers = range(text.num_hidden_layers)
        return MLATokenToKVPool(
            num_tokens, page_size, kv_dtype(config), text.kv_lora_rank, text.qk_rope_head_dim, layers, device
        )
    # Each rank holds at least one KV head, repeated where ranks outnumber heads.
    heads, layer_ids = max(1, text.num_key_value_heads // tp_size), text.full_attention_layer_ids
    return MHATokenToKVPool(num_tokens, page_size, kv_dtype(config), heads, text.head_dim, layer_ids, device)


def state_bytes_per_slot(config: ModelConfig, tp_size: int, ssm_dtype: str | None = None) -> int:
    """Bytes of one recurrent-state slot of one rank; 0 for a model without recurrent layers."""
    pool = make_state_pool(config, 1, tp_size, torch.device("meta"), ssm_dtype)
    return 0 if pool is None else pool.row_bytes()


def make_state_pool(
    config: ModelConfig, num_slots: int, tp_size: int, device: torch.device, ssm_dtype: str | None = None
) -> GDNStatePool | None:
    """The recurrent-state pool of one rank; None for a model without recurrent layers.

    ``ssm_dtype`` names the type of the recurrent state; None takes the checkpoint's.
    """
    text = config.text
    if not isinstance(text, Qwen3_5Config) or not text.linear_layer_ids:
        return None
    key_dim = text.linear_num_key_heads * text.linear_key_head_dim
    value_dim = text.linear_num_value_heads * text.linear_value_head_dim
    conv_dtype = envs.SGLANG_MAMBA_CONV_DTYPE.get()
    return GDNStatePool(
        num_slots,
        text.linear_layer_ids,
        conv_dim=(2 * key_dim + value_dim) // tp_size,
        conv_width=text.linear_conv_kernel_dim,
        num_v_heads=text.linear_num_value_heads // tp_size,
        v_head_dim=text.linear_value_head_dim,
        k_head_dim=text.linear_key_head_dim,
        conv_dtype=getattr(torch, conv_dtype) if conv_dtype else config.dtype,
        ssm_dtype=getattr(torch, ssm_dtype or text.mamba_ssm_dtype),
        device=device,
    )

"""Which of MORI's kernels an exchange uses and how large its buffers are, by settings alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.kernels.ops.quant.group_fp8 import GROUP
from sglang.srt.layers.moe.token_dispatcher.base import EpConfig, ExchangeConfigError
from sglang.srt.layers.moe.token_dispatcher.capacity import source_limit
from sglang.srt.layers.moe.token_dispatcher.config import NODE, MoriConfig

# A node is one domain, which the single-node kernel spans.
WAVE = 64
# SGLANG_MORI_COMBINE_DTYPE -> MORI's codec of combined rows.
COMBINE_CODECS = {"auto": "none", "bf16": "none", "fp8": "fp8_blockwise", "fp8_direct_cast": "fp8_direct_cast"}


@dataclass(frozen=True)
class MoriKernel:
    """One of MORI's kernels and its launch geometry."""

    name: str
    block_num: int
    warp_num_per_block: int
    rdma_block_num: int = 0

    @property
    def is_two_phase(self) -> bool:
        return self.name == "AsyncLL"


INTRA_NODE = MoriKernel("IntraNode", 80, 16)
INTER_NODE = MoriKernel("InterNodeV1", 64, 8, 32)
INTER_NODE_LL = MoriKernel("InterNodeV1LL", 64, 8, 32)
ASYNC_LL = MoriKernel("AsyncLL", 64, 8, 32)
MORI_KERNELS = (INTRA_NODE, INTER_NODE, INTER_NODE_LL, ASYNC_LL)


def choose_kernel(config: MoriConfig) -> MoriKernel:
    """AsyncLL for low latency or copy engines (MORI_ENABLE_SDMA), else by the size of the world and of the limit.

    Raises ExchangeConfigError for what the kernel cannot serve, or would answer by writing past its buffers.
    """
    world = config.world_size
    if config.low_latency or config.copy_engines:
        kernel = ASYNC_LL
    elif world <= NODE:
        kernel = INTRA_NODE
    else:
        kernel = INTER_NODE_LL if config.max_dispatch_tokens <= config.inter_kernel_switch else INTER_NODE
    per_node = min(world, NODE)
    if per_node & (per_node - 1) or world % per_node:
        raise ExchangeConfigError(f"MORI needs 1, 2, 4 or whole nodes of 8 ranks, got --tp-size {world}")
    if kernel is ASYNC_LL and world > WAVE:
        raise ExchangeConfigError(f"MORI's AsyncLL serves at most {WAVE} ranks, got {world}: use --deepep-mode normal")
    if kernel is INTRA_NODE and 0 < config.max_recv_tokens < world:
        raise ExchangeConfigError(
            f"SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS={config.max_recv_tokens} is below {world}, one row of each rank, "
            f"which MORI's IntraNode kernel needs: set at least {world}, or use --deepep-mode low_latency"
        )
    if config.combine_dtype == "fp8" and kernel not in (INTRA_NODE, ASYNC_LL):
        raise ExchangeConfigError(f"SGLANG_MORI_COMBINE_DTYPE=fp8 is not supported by MORI's {kernel.name}: use bf16")
    return kernel


def plan_exchange(
    config: MoriConfig,
    kernel: MoriKernel | None,
    rank: int,
    num_experts: int,
    hidden: int,
    top_k: int,
    dtype: torch.dtype,
    row_dtype: torch.dtype | None = None,
) -> EpConfig:
    """Sizes of one rank's exchange by MORI's ``kernel``, or by the portable transport (None).

    row_dtype: the 8-bit type in which the expert weights take rows, if any. Touches no device. Raises
    ExchangeConfigError, which names the variable or flag, for what cannot be served.
    """
    asked = config.dispatch_dtype
    if asked == "fp4":
        raise ExchangeConfigError(
            "SGLANG_MORI_DISPATCH_DTYPE=fp4 is not supported: rows are sent in 8 bits to fp8 experts, and in 16 bits "
            "to all others, including MXFP4. Unset it"
        )
    if asked == "fp8" and row_dtype is None:
        raise ExchangeConfigError(
            "SGLANG_MORI_DISPATCH_DTYPE=fp8 needs fp8 expert weights, but these experts have none: unset it"
        )
    if kernel is not None and dtype not in (torch.bfloat16, torch.float32):
        raise ExchangeConfigError(f"MORI carries bfloat16 and float32, not the model's {dtype}: add --dtype bfloat16")
    # The variable is AMD's alone, and has no effect elsewhere.
    codec = "none" if kernel is None else COMBINE_CODECS[config.combine_dtype]
    if codec != "none" and dtype != torch.bfloat16:
        raise ExchangeConfigError(
            f"SGLANG_MORI_COMBINE_DTYPE={config.combine_dtype} supports only bfloat16, the model is {dtype}: unset it"
        )
    if codec == "fp8_blockwise" and config.combine_groups * GROUP != hidden:
        raise ExchangeConfigError(
            f"SGLANG_MORI_COMBINE_DTYPE=fp8 with hidden size {hidden} needs MORI_FP8_COMBINE_SCALE_DIM="
            f"{hidden // GROUP}, found {config.combine_groups}"
        )
    travels = row_dtype if row_dtype is not None and asked != "bf16" else dtype
    # Under IntraNode the cap shortens what each rank sends at once, and the op is given none: see source_limit.
    by_source, limit, cap = kernel is INTRA_NODE, config.max_dispatch_tokens, config.max_recv_tokens
    if by_source:
        limit, cap = source_limit(config.world_size, limit, cap), 0
    return EpConfig(
        rank=rank,
        world_size=config.world_size,
        hidden_dim=hidden,
        max_num_inp_token_per_rank=limit,
        num_experts_per_rank=num_experts // config.world_size,
        num_experts_per_token=top_k,
        data_type=travels,
        combine_type=dtype,
        scale_dim=0 if travels is dtype else hidden // GROUP,
        max_total_recv_tokens=cap,
        two_phase=config.low_latency if kernel is None else kernel.is_two_phase,
        combine_wire=codec,
        rows_by_source=by_source,
    )

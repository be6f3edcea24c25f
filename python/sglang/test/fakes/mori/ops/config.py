"""FAKE configuration of the dispatch and combine op; like the vendor's, it checks nothing itself."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, make_dataclass
from enum import Enum

import torch


class EpDispatchCombineKernelType(Enum):
    IntraNode = 0
    InterNode = 1
    InterNodeV1 = 2
    InterNodeV1LL = 3
    AsyncLL = 4
    IntraNodeLL = 5


@dataclass
class EpDispatchCombineConfig:
    data_type: torch.dtype
    rank: int
    world_size: int
    hidden_dim: int
    scale_dim: int
    scale_type_size: int
    max_token_type_size: int
    max_num_inp_token_per_rank: int
    num_experts_per_rank: int
    num_experts_per_token: int
    warp_num_per_block: int = 8
    block_num: int = 80
    max_total_recv_tokens: int = 0
    use_external_inp_buf: bool = True
    kernel_type: EpDispatchCombineKernelType = EpDispatchCombineKernelType.IntraNode
    gpu_per_node: int = 8
    rdma_block_num: int = 0
    num_qp_per_pe: int = 1
    quant_type: str = "none"


# Releases before 1.1.0: a dataclass without the receive cap refuses it as an unknown argument.
ConfigBefore1_1 = make_dataclass(
    "EpDispatchCombineConfig",
    [
        (f.name, f.type) if f.default is MISSING else (f.name, f.type, f.default)
        for f in fields(EpDispatchCombineConfig)
        if f.name != "max_total_recv_tokens"
    ],
)

QUANT_TYPES = ("none", "fp8_direct_cast", "fp8_blockwise", "fp4_blockwise")
_SINGLE_DOMAIN = (EpDispatchCombineKernelType.IntraNode, EpDispatchCombineKernelType.IntraNodeLL)


def recv_rows_per_source(config: EpDispatchCombineConfig) -> int:
    """Rows of the receive buffer that stand for one source; the cap is rounded up and clamped."""
    cap = getattr(config, "max_total_recv_tokens", 0)
    worst = config.max_num_inp_token_per_rank
    return min(-(-cap // config.world_size), worst) if cap > 0 else worst


def check_config(config: EpDispatchCombineConfig) -> None:
    """What the op's constructor asserts or what no kernel could serve; raises ValueError."""
    world, per_node = config.world_size, config.gpu_per_node
    problems = {
        f"invalid quant_type '{config.quant_type}', expected one of {list(QUANT_TYPES)}": (
            config.quant_type not in QUANT_TYPES
        ),
        "quant_type='fp4_blockwise' combine requires a gfx950 GPU": config.quant_type == "fp4_blockwise",
        f"gpu_per_node={per_node} must be a power of 2 that divides world_size={world}": (
            per_node < 1 or per_node & (per_node - 1) != 0 or world % per_node != 0
        ),
        f"{config.kernel_type.name} serves one domain of at most 8 ranks, got {world}": (
            config.kernel_type in _SINGLE_DOMAIN and world > 8
        ),
        f"num_experts_per_token={config.num_experts_per_token} must be below the wave size": (
            not 0 < config.num_experts_per_token < 64
        ),
        f"rank {config.rank} is not in [0, {world})": not 0 <= config.rank < world,
        "sizes must be positive": (
            min(config.hidden_dim, config.max_num_inp_token_per_rank, config.num_experts_per_rank) < 1
        ),
    }
    for message, is_wrong in problems.items():
        if is_wrong:
            raise ValueError(message)

"""Which kind of routed experts a model gets, by the settings of this server."""

from __future__ import annotations

from typing import Any

from torch import nn

from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.distributed.parallel_state import get_world_group, is_dp_attention_enabled
from sglang.srt.layers.moe.ep_moe.gathered import GatheredMoE
from sglang.srt.layers.moe.ep_moe.layer import MoriEPMoE
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.config import MoriConfig
from sglang.srt.layers.moe.token_dispatcher.recv_stats import RecvStats
from sglang.srt.server_args import get_global_server_args


def make_experts(
    num_experts: int,
    hidden: int,
    intermediate: int,
    top_k: int,
    quant_config: QuantConfig | None = None,
    prefix: str = "",
    num_shared: int = 0,
    swiglu_limit: float | None = None,
) -> FusedMoE:
    """Experts whose result is a part of the tensor-parallel sum. Raises ValueError if no exchange serves them."""
    sizes = (num_experts, hidden, intermediate, top_k)
    args = get_global_server_args()
    if args.moe_a2a_backend == "mori":
        if num_shared:
            raise ValueError("experts that exchange tokens cannot contain shared experts")
        config = MoriConfig.from_env(get_world_group().size, low_latency=args.deepep_mode == "low_latency")
        experts: FusedMoE = MoriEPMoE(*sizes, config, quant_config, prefix)
    else:
        kind = GatheredMoE if is_dp_attention_enabled() else FusedMoE
        experts = kind(*sizes, quant_config, prefix, num_shared)
    experts.swiglu_limit = swiglu_limit
    return experts


def expert_recv_stats(model: nn.Module) -> list[RecvStats]:
    """The receive statistics of the dispatchers of ``model``."""
    return list({id(m.recv_stats): m.recv_stats for m in model.modules() if isinstance(m, MoriEPMoE)}.values())


def describe_experts(model: nn.Module) -> dict[str, Any]:
    """The exchange of ``model``'s experts and how full its buffers got, for /server_info; waits for the device."""
    for module in model.modules():
        if isinstance(module, MoriEPMoE):
            return {**module.dispatcher.describe(), "received_rows": module.recv_stats.snapshot()}
        if isinstance(module, FusedMoE):
            kind = "gathered" if isinstance(module, GatheredMoE) else "all-reduce"
            return {"protocol": "none", "transport": kind, "experts_here": module.placement.count}
    return {}

"""Shared experts that are stored as the last of the routed experts, and may be computed from there as a dense MLP."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from sglang.kernels.ops.activation.silu_and_mul import silu_and_mul
from sglang.kernels.ops.moe.fused_experts import is_shuffled
from sglang.kernels.ops.moe.topk import NO_SHARED, SharedSlots
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.configs.shared_experts import SharedExperts
from sglang.srt.distributed.parallel_state import get_parallel_state
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.quantization import Rows
from sglang.srt.layers.weights import ShardId, check_shape
from sglang.srt.server_args import get_global_server_args
from sglang.srt.utils.multi_stream_utils import OverlapSite


def can_fuse(shared: SharedExperts, quant_config: QuantConfig | None) -> bool:
    """Whether a model's shared experts become slots of the routed ones, under the settings of this server."""
    args = get_global_server_args()
    return not (args.disable_shared_experts_fusion or shared.fusion_refusal(quant_config, args.moe_a2a_backend))


def shared_slots(count: int, gated: bool = False) -> SharedSlots:
    """The router's columns for ``count`` slots; every expert-parallel rank adds them, so each adds its part."""
    return SharedSlots(count, 1.0 / get_parallel_state().ep_size, gated) if count else NO_SHARED


def describe_shared(model: nn.Module) -> dict[str, Any]:
    """Which form the shared experts of ``model`` have, for /server_info."""
    for module in model.modules():
        if isinstance(module, FusedSharedExperts):
            form = "by the modes of its site" if not module.fixed_reason else f"fused: {module.fixed_reason}"
            return {"slots": len(module._down), "form": form}
    return {"slots": 0, "form": "apart"}


def fixed_form(model: nn.Module) -> str:
    """Why every step of ``model`` computes its shared experts as routed ones; "" where a step has a choice."""
    return next((module.fixed_reason for module in model.modules() if isinstance(module, FusedSharedExperts)), "")


class SharedExpertView(nn.Module):
    """Checkpoint matrices of the shared experts, as views of the last experts of ``stack``, which hold their weights.

    shards: checkpoint shard id -> matrix of an expert. ``weight``, and ``weight_scale_inv`` for 8-bit weights, are
    views [rows, K], or [experts, rows, K] where the parts do not form one matrix.
    """

    def __init__(self, experts: FusedMoE, stack: str, shards: Mapping[ShardId, str], full: tuple[int, int]) -> None:
        super().__init__()
        # In a tuple, so that torch does not register the experts as a submodule of this module too.
        self._experts, self._shards = (experts,), dict(shards)
        stacked: Any = getattr(experts, stack)
        weight: Any = nn.Parameter(self._view(stacked), requires_grad=False)
        weight.weight_loader, weight.fill = self.weight_loader, stacked.fill
        weight.leaves, weight.encode = stacked.leaves, stacked.encode
        weight.full_shapes = dict.fromkeys(shards, full)
        self.register_parameter("weight", weight)
        scale = getattr(experts, f"{stack}_scale_inv", None)
        if scale is not None:
            self.register_buffer("weight_scale_inv", self._view(scale), persistent=False)

    def _view(self, stacked: torch.Tensor) -> torch.Tensor:
        slots = stacked.data[self._experts[0].placement.count :]
        return slots if "w2" in self._shards.values() and len(slots) > 1 else slots.flatten(0, 1)

    def weight_loader(
        self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None, scale: torch.Tensor | None = None
    ) -> None:
        """Load checkpoint matrix ``shard_id``, cut into one part per fused shared expert."""
        (experts,), name = self._experts, self._shards[shard_id]
        check_shape(loaded, param.full_shapes[shard_id])  # type: ignore[attr-defined]
        dim, count = int(name == "w2"), experts.num_shared
        scales = [None] * count if scale is None else scale.chunk(count, dim)
        for slot, parts in enumerate(zip(loaded.chunk(count, dim), scales, strict=True)):
            experts.load_expert(name, experts.num_experts + slot, *parts)


class FusedSharedExperts(nn.Module):
    """Shared experts whose weights are experts E .. E + n of ``experts``: ``down(silu(gate x) * up x)``.

    The parameters have the names of the MLP's parameters and no storage of their own. A step may compute them as routed
    experts or with ``forward``, if this rank holds the same part of shared and routed experts, in a layout that both
    products can read.
    """

    def __init__(self, experts: FusedMoE) -> None:
        super().__init__()
        state, count = get_parallel_state(), experts.num_shared
        self._experts = (experts,)
        self._same_part = state.ep_size == 1 and state.attn_dp_size == 1
        width, hidden = count * experts.intermediate, experts.hidden
        self.gate_up_proj = SharedExpertView(experts, "w13_weight", {0: "w1", 1: "w3"}, (width, hidden))
        self.down_proj = SharedExpertView(experts, "w2_weight", {None: "w2"}, (hidden, width))
        held = {**dict(self.down_proj.named_parameters()), **dict(self.down_proj.named_buffers())}
        by_slot = {name: tensor.data.view(count, -1, tensor.shape[-1]) for name, tensor in held.items()}
        self._down = [
            SimpleNamespace(**{name: tensor[slot] for name, tensor in by_slot.items()}) for slot in range(count)
        ]

    @property
    def fixed_reason(self) -> str:
        """Why every step must compute them as routed experts; "" if ``forward`` may compute them too."""
        if not self._same_part:
            return "this rank holds another part of routed than of shared experts"
        return "weights are in the experts' kernel's own layout" if is_shuffled(self._experts[0].w13_weight) else ""

    def is_fused(self, site: OverlapSite, num_tokens: int) -> bool:
        """Whether a step of ``num_tokens`` computes them as routed experts; reads no device data."""
        return bool(self.fixed_reason) or site.fuses(num_tokens)

    def forward(self, x: Rows) -> torch.Tensor:
        """x [N, H] -> [N, H], this rank's part of a sum."""
        method = self._experts[0].quant_method
        gate_up = method.apply(self.gate_up_proj, x, None)
        rows = silu_and_mul(gate_up.unflatten(1, (len(self._down), -1))).unbind(1)
        # Summed in slot order.
        return reduce(torch.add, (method.apply(slot, row, None) for slot, row in zip(self._down, rows, strict=True)))

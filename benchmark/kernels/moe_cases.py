"""Shapes and inputs that the Mixture-of-Experts bench and tuner share."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from sglang.kernels.ops.moe.fused_experts import Scaled
from sglang.kernels.ops.quant.group_fp8 import GROUP, fp8_dtype, quantize_groups_triton
from sglang.test.amd_gate.serving_cases.moe import SERVING_MODELS


@dataclass(frozen=True)
class MoeShape:
    """``experts`` experts of width ``intermediate`` over ``hidden``, ``top_k`` per token."""

    experts: int
    hidden: int
    intermediate: int
    top_k: int

    def bytes_of(self, touched: float, tokens: int, itemsize: int) -> float:
        """What must move: the touched experts' three matrices once, the 16-bit rows in and out once."""
        return itemsize * 3 * touched * self.hidden * self.intermediate + 4 * tokens * self.hidden

    def flops(self, tokens: int) -> int:
        return 6 * tokens * self.top_k * self.hidden * self.intermediate


SHAPES = {name: MoeShape(*sizes) for name, sizes in SERVING_MODELS.items()}
TOKENS = (1, 8, 32, 128, 1024, 8192)


@dataclass
class MoeInputs:
    x: torch.Tensor
    w13: Scaled
    w2: Scaled
    # One routing per call, so that replays do not find the last call's experts in the cache.
    weights: list[torch.Tensor]
    ids: list[torch.Tensor]

    @property
    def touched(self) -> float:
        """Experts read by a call, on average over the routings."""
        return statistics.mean(len(ids.unique()) for ids in self.ids)

    def prepare(self, rows: torch.Tensor) -> Scaled:
        """Rows as an operand of a product: as they are, or quantised when the weights are."""
        return Scaled(*quantize_groups_triton(rows, self.w13.data.dtype)) if self.w13.is_fp8 else Scaled(rows)


def make_weights(shape: MoeShape, fp8: bool, arch: str, device: str = "cuda") -> tuple[Scaled, Scaled]:
    """w13 and w2 in bf16, N(0, 1/sqrt(fan_in)); with ``fp8`` 16 N(0, 1) in blocks of 128x128 scaled to the same."""
    made = []
    for rows, columns in ((2 * shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)):
        size = (shape.experts, rows, columns)
        if not fp8:
            w = torch.empty(size, dtype=torch.bfloat16, device=device)
            made.append(Scaled(w.normal_(std=columns**-0.5)))
            continue
        w = torch.empty(size, dtype=fp8_dtype(arch), device=device)
        if device != "meta":
            for expert in w:
                expert.copy_(torch.randn(rows, columns, device=device).mul_(16))
        scale = torch.full((shape.experts, rows // GROUP, columns // GROUP), columns**-0.5 / 16, device=device)
        made.append(Scaled(w, scale))
    return made[0], made[1]


def make_inputs(
    shape: MoeShape, tokens: int, w13: Scaled, w2: Scaled, routings: int, device: str = "cuda"
) -> MoeInputs:
    """Rows N(0, 1) and ``routings`` independent uniform choices of distinct experts."""
    x = torch.randn(tokens, shape.hidden, device=device).bfloat16()
    weights, ids = [], []
    for _ in range(routings):
        chosen = torch.rand(tokens, shape.experts, device=device).topk(shape.top_k, dim=-1)
        weights.append(chosen.values.float().contiguous())
        ids.append(chosen.indices.int().contiguous())
    return MoeInputs(x, w13, w2, weights, ids)

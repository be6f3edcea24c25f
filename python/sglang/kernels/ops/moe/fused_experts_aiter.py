"""The routed experts by AITER, whose kernels read weights in a layout of their own."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sglang.kernels.registry import REGISTRY
from sglang.kernels.spec import Op

# Rows and columns of a tile of AITER's layout, for 8 and 16 bits per weight alike; of two MXFP4 codes the column is
# one.
TILE = (16, 32)
# Rows and columns of scales in a tile of its layout of them (e8m0_shuffle pads to these).
SCALE_TILE = (256, 8)
# The first release that reads off the weights whether they are shuffled; before, it was an option of its build (S).
MXFP4_SINCE = (0, 1, 11)


def is_shuffled(w: Tensor) -> bool:
    """Whether ``w`` is in AITER's layout; the mark is AITER's own, which reads it too."""
    return getattr(w, "is_shuffled", False)


def require_unshuffled(w: Tensor) -> None:
    """Raise ValueError for weights in AITER's layout, which only AITER reads."""
    if is_shuffled(w):
        raise ValueError(
            "these experts were shuffled for AITER's kernel, which does not accept this call or failed earlier (see "
            "the log). Restart with SGLANG_USE_AITER=0, or with SGLANG_KERNELS forcing another implementation."
        )


def shuffle_for_aiter(op: Op, w13: Tensor, w2: Tensor) -> bool:
    """Shuffle loaded experts [E, N, K] into AITER's layout, in place, if AITER runs ``op``; True when it did.

    Works on one expert at a time, so that no second copy of the stack is needed. Matrices that do not consist of whole
    tiles keep their layout.
    """
    whole = all(size % tile == 0 for w in (w13, w2) for size, tile in zip(w.shape[1:], TILE, strict=True))
    fits = whole and w13.dtype == w2.dtype and w13.dtype not in (torch.float32, torch.float64)
    if not fits or is_shuffled(w13) or REGISTRY.chosen(op) != "aiter":
        return False
    from aiter.ops.shuffle import shuffle_weight

    for w in (w13, w2):
        marked: Any = w
        for expert in w.data:
            expert.copy_(shuffle_weight(expert, layout=(16, 16)))
        marked.is_shuffled = True
    return True


def shuffle_mxfp4_for_aiter(op: Op, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor) -> bool:
    """``shuffle_for_aiter`` for codes [E, N, K / 2] and scales [E, N, K / 32]; incomplete tiles are not shuffled."""
    if not hasattr(torch, "float4_e2m1fn_x2"):
        return False
    for scale in (w13_scale, w2_scale):
        rows = scale.shape[0] * scale.shape[1]
        if rows % SCALE_TILE[0] or scale.shape[2] % SCALE_TILE[1]:
            return False
    if not shuffle_for_aiter(op, w13, w2):
        return False
    from aiter.utility.fp4_utils import e8m0_shuffle

    for scale in (w13_scale, w2_scale):
        flat = scale.data.view(-1, scale.shape[2])
        flat.copy_(e8m0_shuffle(flat))
    return True


def fits_fused(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, limit: float | None = None
) -> bool:
    """Shuffled weights in the dtype of the rows, and no clamp."""
    return (
        limit is None
        and is_shuffled(w13)
        and is_shuffled(w2)
        and x.dtype == w13.dtype
        and topk_weights.dtype == torch.float32
    )


def fits_fused_fp8(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    x_scale: Tensor | None = None, dtype: torch.dtype | None = None, limit: float | None = None,
) -> bool:  # fmt: skip
    """Shuffled 8-bit weights, rows that AITER quantises itself or that are of the weights' type already, no clamp."""
    if limit is not None:
        return False
    out = x.dtype if x_scale is None else dtype
    rows = out in (torch.bfloat16, torch.float16) and topk_weights.dtype == torch.float32
    rows = rows and (x_scale is None or x.dtype == w13.dtype)
    return is_shuffled(w13) and is_shuffled(w2) and w13.dtype.itemsize == 1 and rows


def fits_fused_mxfp4(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    limit: float | None = None,
) -> bool:  # fmt: skip
    """Shuffled MXFP4 weights, rows in 16 bits, no clamp."""
    rows = x.dtype in (torch.bfloat16, torch.float16) and topk_weights.dtype == torch.float32
    return limit is None and rows and is_shuffled(w13) and is_shuffled(w2)


@lru_cache(maxsize=8)
def _expert_mask(experts: int, device: torch.device) -> Tensor:
    """int32 [E + 1]: 1 for the experts of this rank, 0 for the one that stands for none."""
    return F.pad(torch.ones(experts, dtype=torch.int32, device=device), (0, 1))


def _fused_moe(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, dtype: torch.dtype, quant: str,
    w13_scale: Tensor | None = None, w2_scale: Tensor | None = None, x_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """AITER's experts, whose results are of ``dtype``; ``quant`` names one of its QuantType.

    It accepts no negative id, so these become a masked expert. With a mask it looks its kernel up for one expert per
    token fewer, because its other callers append a masked column (ROCm/aiter#5595); this function does the same.
    """
    if x.shape[0] == 0:
        return torch.empty_like(x, dtype=dtype)
    from aiter import ActivationType, QuantType
    from aiter.fused_moe import fused_moe

    experts = w13.shape[0]
    ids = F.pad(topk_ids.to(torch.int32), (0, 1), value=-1)
    return fused_moe(
        x.contiguous(), w13, w2, topk_weight=F.pad(topk_weights, (0, 1)), topk_ids=torch.where(ids < 0, experts, ids),
        expert_mask=_expert_mask(experts, ids.device), activation=ActivationType.Silu,
        quant_type=getattr(QuantType, quant), w1_scale=w13_scale, w2_scale=w2_scale, a1_scale=x_scale, dtype=dtype,
    )  # fmt: skip


def fused_experts_fp8_aiter(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    x_scale: Tensor | None = None, dtype: torch.dtype | None = None, limit: float | None = None,
) -> Tensor:  # fmt: skip
    """``moe.fused_experts_fp8``, except that an expert may stand in a row twice only with weight 0."""
    scales = (w13_scale, w2_scale, x_scale)
    return _fused_moe(x, w13, w2, topk_weights, topk_ids, dtype or x.dtype, "per_128x128", *scales)


def fused_experts_mxfp4_aiter(
    x: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    limit: float | None = None,
) -> Tensor:  # fmt: skip
    """``moe.fused_experts_mxfp4`` with rows rounded to MXFP4 before each product; an expert stands in a row once."""
    scales = (scale.view(torch.float8_e8m0fnu) for scale in (w13_scale, w2_scale))
    return _fused_moe(x, _as_pairs(w13), _as_pairs(w2), topk_weights, topk_ids, x.dtype, "per_1x32", *scales)


def _as_pairs(w: Tensor) -> Tensor:
    """Shuffled codes in AITER's four-bit dtype; a view does not inherit ``is_shuffled``, so it is set again."""
    pairs: Any = w.detach().view(torch.float4_e2m1fn_x2)
    pairs.is_shuffled = True
    return pairs  # type: ignore[no-any-return]


def fused_experts_aiter(
    x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor, limit: float | None = None
) -> Tensor:
    """``moe.fused_experts``, except that an expert may stand in a row twice only with weight 0."""
    return _fused_moe(x, w13, w2, topk_weights, topk_ids, x.dtype, "No")

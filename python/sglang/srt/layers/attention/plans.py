"""What the layers of a step share: which cache rows its requests read, and which form of latent attention they take."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.srt.configs.attention_backends import LatentShapes


@dataclass(frozen=True)
class NoRows:
    """The plan of a step without tokens: an attention group takes part and brings nothing."""


@dataclass(frozen=True)
class ExtendPlan:
    """Packed requests of an extend step: kv_slot_ids [M] int64, qo_indptr and kv_indptr [b+1] int64.

    rows: their token rows in the batch, None when the plan covers all rows in order.
    """

    rows: torch.Tensor | None
    kv_slot_ids: torch.Tensor
    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor


@dataclass(frozen=True)
class PartedPlan:
    """Expanded requests whose keys and values are too many at once: the new tokens, then spans of the prefixes.

    rows: their token rows in the batch, None when they are all rows in order. ``new`` is causal, ``prefix`` is seen
    whole by every query of its request.
    """

    rows: torch.Tensor | None
    new: ExtendPlan
    prefix: tuple[ExtendPlan, ...]


@dataclass(frozen=True)
class MlaExtendPlan:
    """An extend step of latent attention: the requests that take each form. Together they are all of the step."""

    absorbed: ExtendPlan | None
    expanded: ExtendPlan | PartedPlan | None


class ExpandWhenCheaper:
    """Compares the multiplications of the two forms of latent attention, per head, for n new tokens of m in all.

    Absorbed: each query enters and leaves the latent space, and meets m rows of width 2R + P. Expanded: each of m rows
    becomes a key and a value, and each query meets rows of width nope + P + v.
    """

    def __init__(self, shapes: LatentShapes) -> None:
        self._transform = shapes.kv_lora_rank * (shapes.qk_nope_head_dim + shapes.v_head_dim)
        self._absorbed_row = 2 * shapes.kv_lora_rank + shapes.qk_rope_head_dim
        self._expanded_row = shapes.qk_nope_head_dim + shapes.qk_rope_head_dim + shapes.v_head_dim

    def __call__(self, new_tokens: int, total_tokens: int) -> bool:
        pairs = new_tokens * total_tokens
        absorbed = new_tokens * self._transform + pairs * self._absorbed_row
        return total_tokens * self._transform + pairs * self._expanded_row < absorbed

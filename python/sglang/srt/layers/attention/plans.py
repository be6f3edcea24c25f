"""What all layers of a step share: the cache rows that its requests read, and the form of latent attention they use."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang.srt.configs.attention_backends import LatentShapes


@dataclass(frozen=True)
class NoRows:
    """The plan of a step without tokens, in which an attention group only joins the collectives."""


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
class ChunkedPrefixPlan:
    """MHA over prefixes whose keys and values do not fit at once: first the new tokens, then chunks of the prefixes.

    rows: token rows of the requests in the batch, None when these are all rows in order. ``new`` is causal; every query
    of a request sees the whole of its ``prefix`` chunks.
    """

    rows: torch.Tensor | None
    new: ExtendPlan
    prefix: tuple[ExtendPlan, ...]


@dataclass(frozen=True)
class MlaExtendPlan:
    """An extend step of latent attention: the requests of each form, which together are all requests of the step."""

    absorbed: ExtendPlan | None
    expanded: ExtendPlan | ChunkedPrefixPlan | None


class MhaWhenCheaper:
    """True where MHA over rebuilt keys and values takes fewer multiplications than the absorbed form.

    Counted per head, for n new tokens of m in total. Absorbed: each query is projected into the latent space and back,
    and attends to m rows of width 2R + P. MHA (expanded): each of the m rows is projected to a key and a value, and
    each query attends to m rows of width nope + P + v.
    """

    def __init__(self, shapes: LatentShapes) -> None:
        self._transform = shapes.kv_lora_rank * (shapes.qk_nope_head_dim + shapes.v_head_dim)
        self._absorbed_row = 2 * shapes.kv_lora_rank + shapes.qk_rope_head_dim
        self._expanded_row = shapes.qk_nope_head_dim + shapes.qk_rope_head_dim + shapes.v_head_dim

    def __call__(self, new_tokens: int, total_tokens: int) -> bool:
        return self.saved(new_tokens, total_tokens) > 0

    def saved(self, new_tokens: int, total_tokens: int) -> int:
        """Multiplications per head that MHA saves, 0 if the absorbed form takes fewer."""
        pairs = new_tokens * total_tokens
        absorbed = new_tokens * self._transform + pairs * self._absorbed_row
        return max(0, absorbed - total_tokens * self._transform - pairs * self._expanded_row)

"""The attention layer as models see it: shapes and scale; the attention backend computes."""

from __future__ import annotations

from torch import nn


class RadixAttention(nn.Module):
    """Softmax attention of one layer over the paged cache.

    num_heads, num_kv_heads: heads on this rank. head_dim: width of a query and key head. scaling: factor on the
    logits. layer_id: which pool layer holds the keys.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scaling: float,
        num_kv_heads: int,
        layer_id: int,
        v_head_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.scaling = scaling
        self.num_kv_heads = num_kv_heads
        self.layer_id = layer_id
        self.v_head_dim = head_dim if v_head_dim is None else v_head_dim

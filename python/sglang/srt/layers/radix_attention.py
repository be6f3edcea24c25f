"""The attention layer as models see it: shapes and scale; the backend does the work."""

from __future__ import annotations

import torch
from torch import nn

from sglang.srt.model_executor.forward_batch_info import ForwardBatch


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

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, fb: ForwardBatch) -> torch.Tensor:
        """q [N, Hq*D], k [N, Hk*D], v [N, Hk*Dv] (or split by heads) -> [N, Hq*Dv]."""
        return fb.attn_backend.forward(q, k, v, self, fb)

"""How DeepSeek V4 pools tokens to entries, and how a token chooses among the entries of ratio 4."""

from __future__ import annotations

import torch
from torch import nn

from sglang.kernels.ops.rope.rotary_tail import rotary_tail
from sglang.srt.configs.deepseek_v4 import DeepseekV4Config
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.layers.attention.base_attn_backend import CompressedBackend, CompressedLayer, backend_of
from sglang.srt.layers.layernorm import Float32RMSNorm
from sglang.srt.layers.linear import MergedReplicatedLinear, ReplicatedLinear
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.weights import make_parameter
from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class DeepseekV4Compressor(nn.Module):
    """Two products of each row, content and gate, of which the backend pools ``ratio`` tokens to an entry of ``pool``.

    Windows of ratio 4 overlap, so their rows have two parts: for the next window, and for their own. The products stay
    plain, as checkpoints have them.
    """

    def __init__(
        self, config: DeepseekV4Config, layer_id: int, ratio: int, head_dim: int, pool: str, rotary_emb: RotaryEmbedding
    ) -> None:
        super().__init__()
        self.layer_id, self.ratio, self.head_dim, self.pool = layer_id, ratio, head_dim, pool
        self.rotary_emb = rotary_emb
        self.width = head_dim * (2 if ratio == 4 else 1)
        self.wkv_gate = MergedReplicatedLinear(config.hidden_size, [self.width, self.width])
        self.position_bias = make_parameter(ratio, self.width, dtype=torch.float32, fill=(0.0, 1.0))
        self.norm = Float32RMSNorm(head_dim, config.rms_norm_eps)

    def forward(self, hidden: torch.Tensor, forward_batch: ForwardBatch) -> None:
        """Store the entries that the rows of hidden [N, H] close."""
        kv, gate = self.wkv_gate(hidden).split((self.width, self.width), dim=-1)
        backend_of(forward_batch, CompressedBackend).compress(kv, gate, self, forward_batch)


class DeepseekV4Indexer(nn.Module):
    """Scores entries by small keys of their own, pooled alike, and keeps the best ``index_topk`` for each token.

    ``score = sum_h w_h relu(q_h . k)`` with w of the token, not quantised. DeepSeek-V4 report, section 2.3.1.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.index_n_heads, config.index_head_dim
        self.rotary_emb = rotary_emb
        self.compressor = DeepseekV4Compressor(config, layer_id, 4, self.head_dim, "c4_index", rotary_emb)
        self.wq_b = ReplicatedLinear(
            config.q_lora_rank, self.num_heads * self.head_dim, False, quant_config, f"{prefix}.wq_b"
        )
        self.weights_proj = ReplicatedLinear(config.hidden_size, self.num_heads)

    def forward(
        self,
        hidden: torch.Tensor,
        latent: torch.Tensor,
        positions: torch.Tensor,
        layer: CompressedLayer,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """hidden [N, H], latent [N, q_lora_rank], positions [N] -> numbers of the entries that each row attends to."""
        self.compressor(hidden, forward_batch)
        q = self.wq_b(latent).unflatten(-1, (self.num_heads, self.head_dim))
        q = rotary_tail(q, positions, self.rotary_emb.cos_sin_cache)
        # A scale that is positive and the same for all entries changes no choice.
        weights = self.weights_proj(hidden)
        return backend_of(forward_batch, CompressedBackend).select_entries(q, weights, layer, forward_batch)

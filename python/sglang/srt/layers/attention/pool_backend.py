"""What backends over paged pools share: from a layer's projections to cache rows and queries."""

from __future__ import annotations

from abc import abstractmethod

import torch

from sglang.kernels.ops.attention.kv_cache import write_kv
from sglang.kernels.ops.attention.prepare_gqa import prepare_gqa
from sglang.kernels.ops.attention.prepare_mla import prepare_mla
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.mem_cache.memory_pool import KVPool, MHATokenToKVPool, MLATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class PoolAttnBackend(AttentionBackend):
    """A backend that keeps one row a token in ``kv_pool``, at ``fb.out_cache_loc``.

    A layer either prepares its rows here and then attends, or gives finished keys and values to ``forward``.
    """

    kv_pool: KVPool

    @abstractmethod
    def attend(self, q: torch.Tensor, layer: RadixAttention, fb: ForwardBatch) -> torch.Tensor:
        """Attend over stored keys and values, this step's included. q [N, Hq, D] -> [N, Hq*Dv]."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, fb: ForwardBatch
    ) -> torch.Tensor:
        """Multi-head or grouped-query attention; see the base class."""
        num_tokens = q.shape[0]
        k = k.view(num_tokens, layer.num_kv_heads, layer.head_dim)
        v = v.view(num_tokens, layer.num_kv_heads, layer.v_head_dim)
        write_kv(k, v, *self._kv_pool().get_kv_buffer(layer.layer_id), fb.out_cache_loc)
        return self.attend(q.view(num_tokens, layer.num_heads, layer.head_dim), layer, fb)

    def prepare_gqa(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        positions: torch.Tensor,
        q_norm: GemmaRMSNorm,
        k_norm: GemmaRMSNorm,
        rotary_emb: RotaryEmbedding,
        layer: RadixAttention,
        fb: ForwardBatch,
    ) -> torch.Tensor:
        """Norm and rotate the heads of q [N, Hq, D] and k [N, Hk, D], store k and v [N, Hk, Dv] -> [N, Hq, D]."""
        assert q_norm.eps == k_norm.eps
        return prepare_gqa(
            q, k, v, q_norm.weight, k_norm.weight, positions, rotary_emb.cos_sin_cache,
            *self._kv_pool().get_kv_buffer(layer.layer_id), fb.out_cache_loc, q_norm.eps, rotary_emb.is_neox,
        )  # fmt: skip

    def prepare_mla(
        self,
        q: torch.Tensor,
        kv_a: torch.Tensor,
        positions: torch.Tensor,
        norm: RMSNorm,
        rotary_emb: RotaryEmbedding,
        layer: RadixAttention,
        fb: ForwardBatch,
        queries: torch.Tensor | None = None,
    ) -> None:
        """Store the rows kv_a [N, R+P], normed and rotated, and rotate the last P columns of q [N, H, nope+P].

        The rotated part stays in q, or goes into the last P columns of ``queries`` [N, H, R+P].
        """
        prepare_mla(
            q, kv_a, positions, rotary_emb.cos_sin_cache, norm.weight, self._latent(layer), fb.out_cache_loc,
            norm.eps, rotary_emb.is_neox, queries,
        )  # fmt: skip

    def _kv_pool(self) -> MHATokenToKVPool:
        assert isinstance(self.kv_pool, MHATokenToKVPool)
        return self.kv_pool

    def _latent(self, layer: RadixAttention) -> torch.Tensor:
        """Latent rows [S, R+P] of the layer."""
        assert isinstance(self.kv_pool, MLATokenToKVPool)
        return self.kv_pool.get_latent(layer.layer_id)

"""Attention of DeepSeek V4: one shared row per token within a window, and compressed entries beyond it."""

from __future__ import annotations

import torch
from torch import nn

from sglang.kernels.ops.rope.rotary_tail import rotary_tail
from sglang.srt.configs.deepseek_v4 import DeepseekV4Config
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.attention.base_attn_backend import CompressedBackend, backend_of
from sglang.srt.layers.layernorm import Float32RMSNorm
from sglang.srt.layers.linear import ColumnParallelLinear, MergedReplicatedLinear, RowParallelLinear
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.weights import make_split_vector
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.deepseek_common.v4_compressor import DeepseekV4Compressor, DeepseekV4Indexer
from sglang.srt.utils.multi_stream_utils import StreamOverlap


class DeepseekV4Attention(nn.Module):
    """Attention of one layer; heads and groups of the output are split over ranks, all that is stored is not.

    Keys and values are one row per token, turned by its position in its last columns; so the output of a head is turned
    back by the position of its query. The group's part of the output goes through a low rank of its own. ``sinks`` [H]
    float32 is a logit per head in the softmax's denominator. DeepSeek-V4 report, section 2.3.
    """

    def __init__(
        self,
        config: DeepseekV4Config,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        quant_config: QuantConfig | None,
        prefix: str,
        overlap: StreamOverlap,
    ) -> None:
        super().__init__()
        self.overlap = overlap
        tp = get_tp_group()
        if config.o_groups % tp.size:
            raise ValueError(f"{config.o_groups} groups of heads cannot be split over {tp.size} ranks (--tp-size).")
        self.layer_id, self.ratio, self.scale = layer_id, config.compress_ratios[layer_id], config.softmax_scale
        self.num_heads, self.num_groups = config.num_attention_heads // tp.size, config.o_groups // tp.size
        self.head_dim, self.q_lora_rank, eps = config.head_dim, config.q_lora_rank, config.rms_norm_eps
        self.rotary_emb = rotary_emb
        hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
        self.fused_wqa_wkv = MergedReplicatedLinear(
            hidden, [config.q_lora_rank, config.head_dim], False, quant_config, f"{prefix}.fused_wqa_wkv"
        )
        self.q_norm = Float32RMSNorm(config.q_lora_rank, eps)
        self.wq_b = ColumnParallelLinear(
            config.q_lora_rank, width, quant_config=quant_config, prefix=f"{prefix}.wq_b"
        )  # fmt: skip
        self.kv_norm = Float32RMSNorm(config.head_dim, eps)
        # Plain whatever the checkpoint holds: each group of its rows is a product of its own.
        self.wo_a = ColumnParallelLinear(
            width // config.o_groups, config.o_groups * config.o_lora_rank, quant_config=quant_config,
            prefix=f"{prefix}.wo_a", dequantize=True,
        )  # fmt: skip
        self.wo_b = RowParallelLinear(
            config.o_groups * config.o_lora_rank, hidden, quant_config=quant_config, prefix=f"{prefix}.wo_b"
        )
        self.sinks = make_split_vector(config.num_attention_heads, tp, torch.float32, fill=(0.0, 1.0))
        self.compressor: DeepseekV4Compressor | None = None
        self.indexer: DeepseekV4Indexer | None = None
        if self.ratio:
            pool = f"c{self.ratio}"
            self.compressor = DeepseekV4Compressor(config, layer_id, self.ratio, config.head_dim, pool, rotary_emb)
        if self.ratio == 4:
            self.indexer = DeepseekV4Indexer(config, layer_id, rotary_emb, quant_config, f"{prefix}.indexer")

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """hidden [N, H], positions [N] -> [N, H]."""
        backend, table = backend_of(forward_batch, CompressedBackend), self.rotary_emb.cos_sin_cache

        def queries() -> torch.Tensor:
            q = self.wq_b(latent).unflatten(-1, (self.num_heads, self.head_dim))
            return backend.prepare(q, kv, self.kv_norm, positions, table, self, forward_batch)

        def entries() -> torch.Tensor | None:
            if self.compressor is not None:
                self.compressor(hidden, forward_batch)
            return None if self.indexer is None else self.indexer(hidden, latent, positions, self, forward_batch)

        q_a, kv = self.fused_wqa_wkv(hidden).split((self.q_lora_rank, self.head_dim), dim=-1)
        latent = self.q_norm(q_a)
        if self.compressor is None:
            chosen, q = None, queries()
        else:
            chosen, q = self.overlap.fork_join(entries, queries, hidden.shape[0])
        out = backend.attend_compressed(q, self, forward_batch, chosen)
        return self.wo_b(self._project_groups(rotary_tail(out, positions, table, True)))

    def _project_groups(self, out: torch.Tensor) -> torch.Tensor:
        """Each group's heads through its rows of wo_a. out [N, heads, D] -> [N, groups * o_lora_rank]."""
        grouped = out.flatten(1).unflatten(1, (self.num_groups, -1)).transpose(0, 1)
        weight = self.wo_a.weight.unflatten(0, (self.num_groups, -1))
        return torch.bmm(grouped, weight.transpose(1, 2)).transpose(0, 1).flatten(1)

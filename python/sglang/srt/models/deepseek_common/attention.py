"""Multi-head latent attention: projections, and both forms: absorbed, and expanded (MHA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sglang.kernels.ops.attention.mla_decode_project import take_out
from sglang.kernels.ops.attention.prepare_mla import absorb
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.attention.base_attn_backend import backend_of
from sglang.srt.layers.attention.plans import ChunkedPrefixPlan, ExtendPlan
from sglang.srt.layers.attention.pool_backend import MlaBackend
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import ColumnParallelLinear, MergedReplicatedLinear, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.quantization import ProjectedRows, Rows, plain_rows
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.layers.weights import join_rows
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

# Both published implementations give the two inner norms this epsilon, regardless of rms_norm_eps.
_INNER_NORM_EPS = 1e-6


class DeepseekV2AttentionMLA(nn.Module):
    """Latent attention of one layer.

    The cache holds one row [R + P] per token, shared by all heads: the normed latent and the rotated key part. Heads
    are split over the tensor-parallel ranks; the latent is not. DeepSeek-V2 report, section 2.1.
    """

    def __init__(
        self,
        config: DeepseekConfig,
        layer_id: int,
        rotary_emb: RotaryEmbedding,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        tp_size = get_tp_group().size
        if config.num_attention_heads % tp_size:
            raise ValueError(f"{config.num_attention_heads} heads cannot be split over {tp_size} ranks (--tp-size).")
        self.num_heads = config.num_attention_heads // tp_size
        self.nope, self.rope, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank = config.kv_lora_rank
        self.q_lora_rank = config.q_lora_rank
        self.rotary_emb = rotary_emb
        hidden, bias = config.hidden_size, config.attention_bias
        q_width = config.num_attention_heads * config.qk_head_dim
        # One matrix of q_proj and kv_a_proj_with_mqa if both are plain, because launches limit a step of one request.
        self._q_and_kv_a: torch.Tensor | None = None
        if config.q_lora_rank is None:
            self.q_proj = ColumnParallelLinear(hidden, q_width, quant_config=quant_config, prefix=f"{prefix}.q_proj")
            self.kv_a_proj_with_mqa = ReplicatedLinear(
                hidden, self.rank + self.rope, bias, quant_config, f"{prefix}.kv_a_proj_with_mqa"
            )
            if quant_config is None and not bias:
                self._q_and_kv_a = join_rows(self.q_proj.weight, self.kv_a_proj_with_mqa.weight)
        else:
            self.fused_qkv_a_proj_with_mqa = MergedReplicatedLinear(
                hidden, [config.q_lora_rank, self.rank + self.rope], bias, quant_config,
                f"{prefix}.fused_qkv_a_proj_with_mqa",
            )  # fmt: skip
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, _INNER_NORM_EPS)
            self.q_b_proj = ColumnParallelLinear(
                config.q_lora_rank, q_width, quant_config=quant_config, prefix=f"{prefix}.q_b_proj"
            )
            self.q_a_layernorm.quantize_for(self.q_b_proj)
            self.q_a_layernorm.project_for(self.q_b_proj)
        self.kv_a_layernorm = RMSNorm(self.rank, _INNER_NORM_EPS)
        # Always plain, because the absorbed form multiplies by its two halves separately.
        self.kv_b_proj = ColumnParallelLinear(
            self.rank, config.num_attention_heads * (self.nope + self.v_dim),
            quant_config=quant_config, prefix=f"{prefix}.kv_b_proj", dequantize=True,
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * self.v_dim, hidden, bias=bias, quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        scale = config.softmax_scale
        self.attn_mqa = RadixAttention(self.num_heads, self.rank + self.rope, scale, 1, layer_id, self.rank)
        self.attn_mha = RadixAttention(self.num_heads, config.qk_head_dim, scale, self.num_heads, layer_id, self.v_dim)
        self.w_kc: torch.Tensor | None = None
        self.w_vc: torch.Tensor | None = None

    @property
    def row_dtype(self) -> torch.dtype | None:
        """As a linear layer's."""
        return (self.q_proj if self.q_lora_rank is None else self.fused_qkv_a_proj_with_mqa).row_dtype

    @property
    def matrix(self) -> torch.Tensor | None:
        """As a linear layer's; None where two products begin."""
        if self._q_and_kv_a is not None:
            return self._q_and_kv_a
        return None if self.q_lora_rank is None else self.fused_qkv_a_proj_with_mqa.matrix

    def split_kv_b(self) -> None:
        """Name the two halves of kv_b_proj: w_kc [H, nope, R] and w_vc [H, R, v], views of the loaded weight."""
        if self._q_and_kv_a is not None and self._q_and_kv_a.data_ptr() != self.q_proj.weight.data_ptr():
            raise RuntimeError("q_proj.weight was given new memory: load it by writing into the parameter")
        per_head = self.kv_b_proj.weight.data.view(self.num_heads, self.nope + self.v_dim, self.rank)
        self.w_kc = per_head[:, : self.nope]
        self.w_vc = per_head[:, self.nope :].transpose(1, 2)

    def forward(
        self, hidden: Rows | ProjectedRows, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """hidden [N, H], positions [N] -> [N, H]; each request uses the form that is cheaper for its length."""
        backend = backend_of(forward_batch, MlaBackend)
        q, kv_a = self._project(hidden)
        norm, rope, layer = self.kv_a_layernorm, self.rotary_emb, self.attn_mqa
        if forward_batch.kind is not None:
            queries = self._new_queries(q)
            backend.prepare_mla(q, kv_a, positions, norm, rope, layer, forward_batch, queries, self.w_kc)
            assert self.w_vc is not None, "weights are not loaded"
            return self.o_proj(backend.decode_absorb(queries, self.w_vc, layer, forward_batch, self.o_proj.row_dtype))
        backend.prepare_mla(q, kv_a, positions, norm, rope, layer, forward_batch)
        out = q.new_empty(q.shape[0], self.num_heads * self.v_dim)
        forms = backend.extend_forms(forward_batch)
        if (part := forms.absorbed) is not None:
            out = _placed(out, part.rows, self.absorbed(_rows(q, part.rows), forward_batch, part))
        if (rest := forms.expanded) is not None:
            out = _placed(out, rest.rows, self.expanded(_rows(q, rest.rows), forward_batch, rest))
        return self.o_proj(out)

    def _project(self, hidden: Rows | ProjectedRows) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [N, heads, nope + rope] and latents next to key parts [N, R + rope], neither normed nor rotated."""
        if self._q_and_kv_a is not None:
            widths = (self.num_heads * (self.nope + self.rope), self.rank + self.rope)
            if isinstance(hidden, ProjectedRows):
                made = hidden.product
            else:
                made = F.linear(plain_rows(hidden), self._q_and_kv_a)
            q, kv_a = made[:, : sum(widths)].split(widths, dim=-1)
        elif self.q_lora_rank is None:
            q, kv_a = self.q_proj(hidden), self.kv_a_proj_with_mqa(hidden)
        else:
            q_a, kv_a = self.fused_qkv_a_proj_with_mqa(hidden).split((self.q_lora_rank, self.rank + self.rope), dim=-1)
            q = self.q_b_proj(self.q_a_layernorm(q_a))
        return q.view(-1, self.num_heads, self.nope + self.rope), kv_a

    def _new_queries(self, q: torch.Tensor) -> torch.Tensor:
        """Buffer for queries of the absorbed form [n, heads, R + rope]."""
        return q.new_empty(q.shape[0], self.num_heads, self.rank + self.rope)

    def absorbed(self, q: torch.Tensor, forward_batch: ForwardBatch, plan: ExtendPlan) -> torch.Tensor:
        """The absorbed form: queries in the latent space, q W_UK, attend to the cached rows. q [n, heads, nope+rope],
        rotated in place -> [n, heads*v].

        The context is in the latent space, and W_UV projects it to values.
        """
        assert self.w_kc is not None and self.w_vc is not None, "weights are not loaded"
        queries = self._new_queries(q)
        queries[..., self.rank :] = q[..., self.nope :]
        absorb(q, self.w_kc, queries)
        return take_out(backend_of(forward_batch, MlaBackend).forward_absorb(queries, self.attn_mqa, plan), self.w_vc)

    def expanded(
        self, q: torch.Tensor, forward_batch: ForwardBatch, plan: ExtendPlan | ChunkedPrefixPlan
    ) -> torch.Tensor:
        """The expanded form: queries attend to keys and values rebuilt for every head. q [n, heads, nope+rope] -> [n,
        heads*v]."""
        return backend_of(forward_batch, MlaBackend).forward_mha(q, self.keys_and_values, self.attn_mha, plan)

    def keys_and_values(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cache rows [m, R + rope] -> keys [m, heads, nope], values [m, heads, v] and the rotated part of every head's
        keys [m, rope], all views."""
        latent, k_pe = rows.split((self.rank, self.rope), dim=-1)
        kv = self.kv_b_proj(latent).view(-1, self.num_heads, self.nope + self.v_dim)
        k_nope, v = kv.split((self.nope, self.v_dim), dim=-1)
        return k_nope, v, k_pe


def _rows(q: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The rows of ``q`` that a part of a step uses; None: all rows."""
    return q if rows is None else q[rows]


def _placed(out: torch.Tensor, rows: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    """``out`` with ``part`` at its rows; ``part`` itself if it is every row."""
    if rows is None:
        return part
    out[rows] = part
    return out

"""What backends over paged pools share: how a layer's projections become cache rows and queries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch

from sglang.kernels.ops.activation.sigmoid_mul import sigmoid_mul
from sglang.kernels.ops.attention.extend_ragged import extend_ragged
from sglang.kernels.ops.attention.kv_cache import read_rows, write_kv
from sglang.kernels.ops.attention.mla_decode_project import take_out
from sglang.kernels.ops.attention.prepare_gqa import prepare_gqa
from sglang.kernels.ops.attention.prepare_mla import prepare_mla
from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionContext
from sglang.srt.layers.attention.plans import ChunkedPrefixPlan, ExtendPlan, MhaWhenCheaper, MlaExtendPlan, NoRows
from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm
from sglang.srt.layers.quantization import Rows
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import RotaryEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ModelWorkerBatch, StepPlan

# Multiplications of a layer that a captured step may need above the cheaper form: about 1 ms of an H200, as long as it
# takes to launch the kernels of a layer.
MAX_CAPTURED_EXTRA = 1 << 35
# Latent rows [m, R+P] -> keys [m, H, nope], values [m, H, v] and the last columns of every head's keys [m, P].
Expand = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class PoolBackend(AttentionBackend):
    """Base of backends over paged pools: they read the request table [rows, positions] int32."""

    def __init__(self, ctx: AttentionContext) -> None:
        self.req_to_token = ctx.req_to_token_pool.req_to_token
        self.device = ctx.device


class CapturingPoolBackend(PoolBackend):
    """A backend whose steps are captured: it keeps the plan of each captured step, by kind and number of requests."""

    def __init__(self, ctx: AttentionContext) -> None:
        super().__init__(ctx)
        self._captured: dict[tuple[str, int], object] = {}

    def init_cuda_graph_state(self, max_bs: int, max_context_len: int) -> None:
        """Forget earlier captures; raises ValueError when a context does not fit into the request table."""
        if max_context_len > self.req_to_token.shape[1]:
            raise ValueError(
                f"graphs for contexts of {max_context_len} tokens need a request table of as many columns; it has "
                f"{self.req_to_token.shape[1]}"
            )
        self._captured = {}

    def keep_captured(self, forward_batch: ForwardBatch, plan: object) -> None:
        """Set ``plan`` on a step that will be captured, and keep it for the replays."""
        assert forward_batch.kind is not None
        self._captured[forward_batch.kind.name, forward_batch.batch_size] = plan
        forward_batch.attn_plan = StepPlan(attention=plan)

    def captured_plan(self, forward_batch: ForwardBatch) -> object:
        """The plan of the captured step to replay; raises ValueError for a step that was not captured."""
        assert forward_batch.kind is not None
        if (forward_batch.kind.name, forward_batch.batch_size) not in self._captured:
            raise ValueError(f"no {forward_batch.kind.name} step of {forward_batch.batch_size} requests was captured")
        return self._captured[forward_batch.kind.name, forward_batch.batch_size]


class KvBackend(PoolBackend):
    """A backend of softmax attention over the rows of one pool."""

    @abstractmethod
    def attend_rows(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor | None, layer: RadixAttention, plan: object
    ) -> torch.Tensor:
        """q [N, Hq, D] over rows that ``plan`` names -> [N, Hq, Dv]; caches as ``attention.extend_attention`` has them,
        ``layer.v_head_dim`` is the rank. Raises TypeError for rows that were not planned."""

    @abstractmethod
    def extend_plan(self, forward_batch: ForwardBatch, members: list[int]) -> ExtendPlan:
        """The plan of the requests ``members`` of an extend step, over the whole context of each."""


class GqaBackend(KvBackend):
    """Multi-head and grouped-query attention: one row of keys and values per token in ``kv_pool``, at
    ``forward_batch.out_cache_loc``."""

    def __init__(self, ctx: AttentionContext) -> None:
        super().__init__(ctx)
        self.kv_pool = ctx.pools["kv"]

    def store(self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> None:
        """Write k [N, Hk, D] and v [N, Hk, Dv] at ``out_cache_loc``."""
        write_kv(k, v, *self.kv_pool.layer(layer.layer_id), forward_batch.out_cache_loc)

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
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Norm and rotate the heads of q [N, Hq, D] and k [N, Hk, D], store k and v [N, Hk, Dv] -> [N, Hq, D]."""
        assert q_norm.eps == k_norm.eps
        return prepare_gqa(
            q, k, v, q_norm.weight, k_norm.weight, positions, rotary_emb.cos_sin_cache,
            *self.kv_pool.layer(layer.layer_id), forward_batch.out_cache_loc, q_norm.eps, rotary_emb.is_neox,
        )  # fmt: skip

    def plan_extend(self, forward_batch: ForwardBatch) -> ExtendPlan:
        return self.extend_plan(forward_batch, list(range(forward_batch.batch_size)))

    def attend(
        self, q: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch, gate: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend over stored keys and values, this step's included. q [N, Hq, D] -> [N, Hq*Dv], times the sigmoid of
        ``gate`` [N, Hq, Dv] if that is given."""
        caches = self.kv_pool.layer(layer.layer_id)
        out = self.attend_rows(q, caches[0], caches[1], layer, forward_batch.attn_plan.attention)
        return (out if gate is None else sigmoid_mul(out, gate)).flatten(1)


class MlaBackend(KvBackend):
    """Latent attention: one latent row per token in ``kv_pool``, at ``forward_batch.out_cache_loc``.

    It has two forms with the same result. Absorbed: queries attend to the latent rows as stored, which is
    cheap for few queries. Expanded (MHA): keys and values are rebuilt from the latent rows of the whole context, which
    is cheap for many queries. Decode steps always use the absorbed form.
    """

    def __init__(self, ctx: AttentionContext) -> None:
        super().__init__(ctx)
        self.kv_pool = ctx.pools["latent"]
        shapes = ctx.model_config.text.latent_shapes
        assert shapes is not None, "the settings give this backend only to models with latent attention"
        self.shapes = shapes
        # Whether a request of an extend step uses MHA, by its new and its total tokens.
        self.use_mha = MhaWhenCheaper(shapes)
        self.num_heads = ctx.model_config.text.num_attention_heads // get_tp_group().size

    def prepare_mla(
        self,
        q: torch.Tensor,
        kv_a: torch.Tensor,
        positions: torch.Tensor,
        norm: RMSNorm,
        rotary_emb: RotaryEmbedding,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        queries: torch.Tensor | None = None,
        w_kc: torch.Tensor | None = None,
    ) -> None:
        """Store the rows kv_a [N, R+P], normed and rotated, and rotate the last P columns of q [N, H, nope+P].

        The rotated part stays in q, or goes into the last P columns of ``queries`` [N, H, R+P], whose others take the
        rest of q times w_kc [H, nope, R].
        """
        prepare_mla(
            q, kv_a, positions, rotary_emb.cos_sin_cache, norm.weight, self._latent(layer), forward_batch.out_cache_loc,
            norm.eps, rotary_emb.is_neox, queries, w_kc,
        )  # fmt: skip

    def replays_extend(self, batch: ModelWorkerBatch) -> bool:
        """See the base class; a captured step has the absorbed form alone, which may cost much more."""
        assert batch.extend_seq_lens is not None
        more = sum(map(self.use_mha.saved, batch.extend_seq_lens, batch.seq_lens))
        return self.plans_bounds and more * self.num_heads <= MAX_CAPTURED_EXTRA

    def plan_extend(self, forward_batch: ForwardBatch) -> MlaExtendPlan:
        if forward_batch.bounds is not None:
            return MlaExtendPlan(self.extend_plan(forward_batch, list(range(forward_batch.batch_size))), None)
        lengths = forward_batch.extend_seq_lens_cpu
        assert lengths is not None
        expanded = [i for i, new in enumerate(lengths) if self.use_mha(new, forward_batch.seq_lens_cpu[i])]
        absorbed = sorted(set(range(len(lengths))) - set(expanded))
        return MlaExtendPlan(
            self.extend_plan(forward_batch, absorbed) if absorbed else None,
            self.expanded_plan(forward_batch, expanded) if expanded else None,
        )

    def expanded_plan(self, forward_batch: ForwardBatch, members: list[int]) -> ExtendPlan | ChunkedPrefixPlan:
        """The plan of ``members``, which use MHA."""
        return self.extend_plan(forward_batch, members)

    def extend_forms(self, forward_batch: ForwardBatch) -> MlaExtendPlan:
        """Which requests of an extend step use which form."""
        plan = forward_batch.attn_plan.attention
        if isinstance(plan, MlaExtendPlan):
            return plan
        raise TypeError(f"the step was planned as {type(plan).__name__}, not as an extend step of latent attention")

    def decode_absorb(
        self,
        q: torch.Tensor,
        w_vc: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        row_dtype: torch.dtype | None = None,
    ) -> Rows:
        """``forward_absorb`` for every row of a step that is no extend step, and then times w_vc [H, R, v] -> [N, H*v].

        row_dtype: of the product that takes the result, which may come as ``QuantizedRows`` of it.
        """
        rows = self._latent(layer).unsqueeze(1)
        return take_out(self.attend_rows(q, rows, None, layer, forward_batch.attn_plan.attention), w_vc)

    def forward_absorb(self, q: torch.Tensor, layer: RadixAttention, plan: ExtendPlan) -> torch.Tensor:
        """Attend over stored latent rows, this step's included: q [n, H, R+P], the rows of ``plan``, -> [n, H, R].

        ``layer.v_head_dim`` is R.
        """
        return self.attend_rows(q, self._latent(layer).unsqueeze(1), None, layer, plan)

    def gather_latent(self, layer: RadixAttention, plan: ExtendPlan, dtype: torch.dtype) -> torch.Tensor:
        """The latent rows [M, R+P] of ``plan``, packed by request, in ``dtype``."""
        return read_rows(self._latent(layer), plan.kv_slot_ids, dtype)

    def forward_mha(
        self, q: torch.Tensor, expand: Expand, layer: RadixAttention, plan: ExtendPlan | ChunkedPrefixPlan
    ) -> torch.Tensor:
        """Attend over keys and values that ``expand`` rebuilds from latent rows: q [n, H, qk] -> [n, H*v]."""
        assert isinstance(plan, ExtendPlan), "this backend never plans MHA in chunks of the prefix"
        k, v, k_pe = expand(self.gather_latent(layer, plan, q.dtype))
        return extend_ragged(q, k, v, plan.qo_indptr, plan.kv_indptr, layer.scaling, k_pe).flatten(1)

    def _latent(self, layer: RadixAttention) -> torch.Tensor:
        """Latent rows [S, R+P] of the layer."""
        return self.kv_pool.layer(layer.layer_id)[0]


def no_output(q: torch.Tensor, plan: object, *shape: int) -> torch.Tensor:
    """The output [0, *shape] of a step without rows; raises TypeError for a plan or a ``q`` that has rows."""
    if not isinstance(plan, NoRows) or q.shape[0]:
        raise TypeError(f"{q.shape[0]} rows to attend, and the step was planned as {type(plan).__name__}")
    return q.new_empty(0, *shape)

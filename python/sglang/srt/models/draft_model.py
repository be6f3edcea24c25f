"""A draft model: one decoder layer that predicts the token after next from the target's embedding and hidden rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import nn

from sglang.srt.arg_groups.stream_policy import StreamPlan
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.causal_lm import CausalLM, DecoderLayer
from sglang.srt.models.checkpoint_model import CheckpointModel


class DraftParts(NamedTuple):
    """The parts of a draft layer; each is registered in the module tree under its checkpoint's name."""

    embed_norm: RMSNorm
    hidden_norm: RMSNorm
    projection: ReplicatedLinear
    layer: DecoderLayer
    final_norm: RMSNorm

    @classmethod
    def of(cls, layer: DecoderLayer, config: ModelConfig, norm: type[RMSNorm]) -> DraftParts:
        """``layer`` with fresh norms of class ``norm`` and the projection of its two inputs."""
        hidden, eps = config.text.hidden_size, config.text.rms_norm_eps
        # Published fp8 checkpoints hold it plain; one that does not is scaled back.
        projection = ReplicatedLinear(2 * hidden, hidden, quant_config=config.quant_config, dequantize=True)
        return cls(norm(hidden, eps), norm(hidden, eps), projection, layer, norm(hidden, eps))


class DraftModel(CheckpointModel, ABC):
    """``norm(layer(W [norm_e(embed(token)), norm_h(hidden)]))`` and the target's head.

    A row pairs a token with the hidden row of the token before it: the target's, after its final norm, or the draft's
    own output. DeepSeek-V3 report, section 2.2.
    """

    def __init__(self, config: ModelConfig, target: CausalLM, layer_id: int, streams: StreamPlan) -> None:
        """layer_id: of the layer's KV, in the pool of the target. streams: of the target too."""
        super().__init__()
        # In tuples: they are the target's, and no checkpoint tensor of the draft is theirs.
        self._shared: tuple[VocabParallelEmbedding, ParallelLMHead] = (target.model.embed_tokens, target.lm_head)
        self._parts: DraftParts | None = None
        # Columns of the rows that it reads and hands on.
        self.hidden_width = config.text.hidden_size
        self.logits_processor = LogitsProcessor(config.text.vocab_size)

    @staticmethod
    @abstractmethod
    def checkpoint_prefix(config: ModelConfig) -> str:
        """How the names of the layer's tensors begin in a checkpoint."""

    def set_parts(self, parts: DraftParts) -> None:
        """Compute with ``parts``, which the subclass has registered."""
        self._parts = parts
        self.num_fused_shared_experts = parts.layer.mlp.num_fused_shared_experts if parts.layer.is_moe else 0

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch, hidden: torch.Tensor
    ) -> LogitsProcessorOutput:
        """input_ids [N], positions [N], hidden [N, H] -> logits of the wanted rows, and all ``hidden_states`` [N, H].

        The layer writes its KV of every row at ``forward_batch.out_cache_loc``.
        """
        assert self._parts is not None
        embed_tokens, lm_head = self._shared
        embed_norm, hidden_norm, projection, layer, final_norm = self._parts
        joined = torch.cat((embed_norm(embed_tokens(input_ids)), hidden_norm(hidden)), dim=-1)
        rows = final_norm(*layer(positions, projection(joined), None, forward_batch))[0]
        output = self.logits_processor(rows, lm_head, forward_batch)
        output.hidden_states = rows
        return output


def named(**modules: nn.Module) -> nn.Module:
    """A module that only holds ``modules``, for a level of a checkpoint's names."""
    holder = nn.Module()
    for name, module in modules.items():
        holder.add_module(name, module)
    return holder

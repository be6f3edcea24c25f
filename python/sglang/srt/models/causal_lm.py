"""What the served models have in common: a layer's norms and residual, the walk through the layers, and the head."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sglang.srt.configs.model_config import TextConfig
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.models.checkpoint_model import CheckpointModel

_LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.")


class DecoderLayer(nn.Module, ABC):
    """A mixer of tokens and a feed-forward, each after a norm of the residual; subclasses add ``mix`` and ``mlp``."""

    is_moe: bool
    mlp: nn.Module

    def __init__(self, text: TextConfig, norm: type[RMSNorm]) -> None:
        super().__init__()
        self.input_layernorm = norm(text.hidden_size, text.rms_norm_eps)
        self.post_attention_layernorm = norm(text.hidden_size, text.rms_norm_eps)

    @abstractmethod
    def mix(self, positions: torch.Tensor, hidden: Any, forward_batch: ForwardBatch) -> torch.Tensor:
        """The layer's own mixer of tokens. positions [N], hidden [N, H] as its norm gives it -> [N, H]."""

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None, forward_batch: ForwardBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden [N, H] is what the layer before added, residual [N, H] the sum before it (None at the first layer)."""
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.mix(positions, hidden, forward_batch)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden, forward_batch) if self.is_moe else self.mlp(hidden), residual


class Backbone(nn.Module):
    """Token ids to normed hidden rows."""

    def __init__(self, text: TextConfig, norm: type[RMSNorm], layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = norm(text.hidden_size, text.rms_norm_eps)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """input_ids [N], positions [N] -> [N, H]."""
        hidden, residual = self.embed_tokens(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(positions, hidden, residual, forward_batch)
        return self.norm(hidden, residual)[0]


class CausalLM(CheckpointModel):
    """A backbone and its output head."""

    def __init__(self, text: TextConfig, backbone: Backbone, side_stream: torch.cuda.Stream | None = None) -> None:
        """side_stream: what the places of ``backbone`` that overlap share; a draft model uses it too."""
        super().__init__()
        self.text, self.side_stream = text, side_stream
        self.num_hidden_layers = text.num_hidden_layers
        self.tied = text.tie_word_embeddings
        self.model = backbone
        self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size)
        if self.tied:
            self.lm_head.weight = backbone.embed_tokens.weight
        self.logits_processor = LogitsProcessor(text.vocab_size)
        slots = [layer.mlp.num_fused_shared_experts for layer in backbone.layers if layer.is_moe]
        self.num_fused_shared_experts = slots[0] if slots else 0

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, forward_batch: ForwardBatch
    ) -> LogitsProcessorOutput:
        """input_ids [N], positions [N] -> logits of each request's last row."""
        return self.logits_processor(self.model(input_ids, positions, forward_batch), self.lm_head, forward_batch)

    def checkpoint_name(self, name: str) -> str | None:
        """Layers past the last one (a draft head, or what an override cut off) and a tied head are not taken."""
        layer = _LAYER_NAME.match(name)
        if layer is not None and int(layer.group(1)) >= self.num_hidden_layers:
            return None
        return None if self.tied and name == "lm_head.weight" else name

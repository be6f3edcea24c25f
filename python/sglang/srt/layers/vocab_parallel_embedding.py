"""Token embedding and output head with the vocabulary split over tensor-parallel ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sglang.srt.distributed.parallel_state import get_tp_group
from sglang.srt.layers.weights import ShardId, check_shape, make_parameter


class _VocabShard(nn.Module):
    """Rows ``[rank * rows, (rank + 1) * rows)`` of a [vocab, hidden] matrix; rows past the vocabulary are zero."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self._tp = get_tp_group()
        self.vocab_size = vocab_size
        self.rows = -(-vocab_size // self._tp.size)
        self.first = self._tp.rank * self.rows
        self._full_shape = (vocab_size, hidden_size)
        self.weight = make_parameter(
            self.rows, hidden_size, loader=self.weight_loader, full_shapes={None: self._full_shape}
        )

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, shard_id: ShardId = None) -> None:
        """Copy this rank's rows and zero the padding."""
        check_shape(loaded, self._full_shape)
        count = max(0, min(self.rows, self.vocab_size - self.first))
        param.data[:count].copy_(loaded[self.first : self.first + count])
        param.data[count:].zero_()


class VocabParallelEmbedding(_VocabShard):
    """Rows of the embedding matrix by token id."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids [N] int64 in [0, vocab) -> [N, hidden]."""
        if self._tp.size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        out = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self._tp.all_reduce(out.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class ParallelLMHead(_VocabShard):
    """The output projection; ``logits`` gathers the ranks' parts of the vocabulary."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, hidden] -> logits [N, vocab] in hidden's dtype, the same on every rank."""
        logits = F.linear(hidden, self.weight)
        if self._tp.size > 1:
            logits = self._tp.all_gather(logits, dim=-1)[:, : self.vocab_size]
        return logits

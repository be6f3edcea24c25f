"""Exact verification: the target draws its own token at each row, and drafts count while they equal it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Accepted:
    """What a step gave: sampled [B, W] int64, of which the first ``num_new`` [B] int64 of each request are its tokens.

    ``told`` [B, 2 W + 1] int64 is what the host gets to know of a verify step: ids, faults and number of each request.
    ``bucket`` is that of the graph that has left all of it for the draft's, too; None for an eager step.
    """

    sampled: torch.Tensor
    num_new: torch.Tensor
    told: torch.Tensor | None = None
    bucket: int | None = None

    @property
    def last_rows(self) -> torch.Tensor:
        """Rows of the step, [B], from which the last token of each request was sampled."""
        size, width = self.sampled.shape
        return torch.arange(size, device=self.sampled.device) * width + self.num_new - 1


def num_new_tokens(sampled: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """How many of the sampled tokens [B, W] follow accepted drafts [B, W - 1]: [B] int64 in 1..W.

    Row j of a request was computed behind its first j drafts, so its token is the target's own as long as these drafts
    are what the target drew. A draw depends on seed and position alone (see ``sampling.draw``), so the tokens are
    those of decoding one by one, at any temperature.
    """
    return (sampled[:, :-1] == drafts).long().cumprod(1).sum(1) + 1

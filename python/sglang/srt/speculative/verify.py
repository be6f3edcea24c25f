"""Exact verification: the target samples a token at each row; draft tokens are accepted while they equal it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Accepted:
    """Result of a step: sampled [B, W] int64; the first ``num_new`` [B] int64 of each request are its new tokens.

    ``told`` [B, 2 W + 1] int64 is what a verify step sends to the host: ids, faults and count of each request.
    ``bucket``: the graph of this bucket has also written the draft's inputs; None for an eager step.
    """

    sampled: torch.Tensor
    num_new: torch.Tensor
    told: torch.Tensor | None = None
    bucket: int | None = None

    def known_ids(self) -> list[list[int]]:
        """The new tokens of each request that the host can read without waiting; -1 for one that only a device has."""
        if self.sampled.device.type != "cpu":
            return [[-1]] * len(self.sampled)
        return [ids[:count] for ids, count in zip(self.sampled.tolist(), self.num_new.tolist(), strict=True)]

    @property
    def last_rows(self) -> torch.Tensor:
        """The row [B] of the step from which the last token of each request was sampled."""
        size, width = self.sampled.shape
        return torch.arange(size, device=self.sampled.device) * width + self.num_new - 1


def num_new_tokens(sampled: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """How many of the sampled tokens [B, W] follow accepted draft tokens [B, W - 1]: [B] int64 in 1..W.

    Row j of a request was computed after its first j draft tokens, so its token is the target's own if the target
    sampled exactly these. Sampling depends only on seed and position (see ``sampling.draw``), so the tokens are those
    of decoding one by one, at any temperature.
    """
    return (sampled[:, :-1] == drafts).long().cumprod(1).sum(1) + 1

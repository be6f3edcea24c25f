"""Exact verification: the target draws its own token at each row, and drafts count while they equal it."""

from __future__ import annotations

import torch


def num_new_tokens(drawn: torch.Tensor, drafts: torch.Tensor) -> torch.Tensor:
    """How many of the drawn tokens [B, W] stand behind accepted drafts [B, W - 1]: [B] int64 in 1..W.

    Row j of a request was computed behind its first j drafts, so its token is the target's own as long as these drafts
    are what the target drew. A draw depends on seed and position alone (see ``sampling.draw``), so the tokens are
    those of decoding one by one, at any temperature.
    """
    return (drawn[:, :-1] == drafts).long().cumprod(1).sum(1) + 1

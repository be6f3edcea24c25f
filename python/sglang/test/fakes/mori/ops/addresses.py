"""Which rows of the receive buffers the single-node kernels of MORI write, and what is outside of them.

Read in ROCm/mori, ``src/ops/dispatch_combine`` of v1.1.0, v1.2.2 and commit 624002c8 (line numbers of the last):

- ``dispatch_combine.cpp`` 303-325: dispatch output and combine input are allocated with ``MaxNumTokensToRecv()`` rows,
  which ``maxTotalRecvTokens`` shortens; combine output with ``maxNumInpTokenPerRank``.
- ``intranode.hpp`` 151-203, dispatch: rows that reach a rank get the slots 0, 1, 2, … there, from any sender. v1.1.0
  to v1.2.2 assert that a slot is inside (v1.1.0: 121); later releases do not.
- ``intranode.hpp`` 345 and 383, combine of an external input: rank r writes what it made of a source's row t to row
  ``SendBufSlotOffset(r, t) = r * maxNumInpTokenPerRank + t`` (``common.hpp`` 49) of the source's combine input, and 534
  reads it there. Nothing checks it.
- ``intranode.hpp`` 302-317 and 521, combine of the registered buffer: rank r reads and writes its own rows
  ``[0, totalRecvTokenNum)``, and the source reads row n of rank r, where n is dispatch's slot.
"""

from __future__ import annotations

import torch


def last_dispatch_rows(goes: torch.Tensor) -> torch.Tensor:
    """The last row that dispatch writes at each destination, -1 for none.

    goes [..., W sources, T, W destinations] bool: which rows go where -> [..., W] int64.
    """
    return goes.sum((-3, -2)) - 1


def last_combine_rows(goes: torch.Tensor, rows_per_source: int) -> torch.Tensor:
    """The last row that combine of an external input writes back at each source, -1 for none.

    goes [..., W sources, T, W destinations] bool, rows_per_source: maxNumInpTokenPerRank -> [..., W] int64.
    """
    tokens, ranks = torch.arange(goes.shape[-2]).unsqueeze(1), torch.arange(goes.shape[-1])
    return torch.where(goes, ranks * rows_per_source + tokens, -1).amax((-2, -1))

"""Ids that a kernel chose, before the device uses them: those outside the vocabulary are replaced and marked."""

from __future__ import annotations

import torch
from torch import Tensor

from sglang.kernels.launch import cdiv, early_start, triton_impl
from sglang.kernels.spec import Impl, Op

# Why a row has no token although its logits are sound: the id that was chosen is none.
TOKEN_ID_FAULT = 3
BLOCK = 256


def check_ids_torch(chosen: Tensor, faults: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """chosen [B] int32 or int64 and faults [B] int64, 0 for none -> ids [B] and faults [B], in the same dtypes.

    Ids are in [0, vocab_size). A row without a fault gets ``TOKEN_ID_FAULT`` where its id was not.
    """
    ids = chosen.clamp(0, vocab_size - 1)
    outside = torch.where(chosen == ids, 0, TOKEN_ID_FAULT)
    return ids, torch.where(faults == 0, outside, faults)


def check_ids_triton(chosen: Tensor, faults: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    from sglang.kernels.ops.sampling.check_ids_triton import check_ids_kernel

    ids, checked = torch.empty_like(chosen), torch.empty_like(faults)
    if rows := chosen.numel():
        check_ids_kernel[(cdiv(rows, BLOCK),)](
            chosen, faults, ids, checked, rows, vocab_size, BLOCK=BLOCK, num_warps=4, **early_start()
        )
    return ids, checked


def _accepts(chosen: Tensor, faults: Tensor, vocab_size: int) -> bool:
    return chosen.is_contiguous() and faults.is_contiguous()


check_ids = Op("sampling.check_ids", triton_impl(check_ids_triton, _accepts), Impl("torch", check_ids_torch))

"""Greedy choice: the index of the largest logit of each row, and whether the row is sound."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, aiter_impl, cdiv, early_start, next_power_of_2, triton_impl
from sglang.kernels.spec import Impl, Op
from sglang.srt.platforms import current_platform

# AITER reads rows in vectors of this many logits: of a shorter last one it takes what is past V for 0.
AITER_VECTOR = 16
# Logits that one program of the Triton form reads.
BLOCK = 2048
# Why nothing can be drawn from a row: its logits.
LOGITS_FAULT = 1


def greedy_torch(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the largest logit in each row, and why there is none.

    logits [B, V] float, any strides -> ids [B] int64 (AITER: int32), in [0, V), and faults [B] int64. Ties take the
    first. A row with NaN, +inf or nothing finite has ``LOGITS_FAULT``, others 0; a row of -inf gives 0, a row that
    holds NaN the index of its first NaN (AITER: any integer for either). The caller refuses such rows, and every id
    outside [0, V), see ``Sampler``.
    """
    # Unlike ``argmax``, this is documented to give the first of the largest. NaN is larger than all.
    best, ids = logits.max(dim=-1)
    return ids, _faults(best)


def _faults(best: Tensor) -> Tensor:
    """By the largest logit of each row: NaN and infinities alike are not below infinity."""
    return torch.where(best.abs() < math.inf, 0, LOGITS_FAULT)


def greedy_aiter(logits: Tensor, kernel: Callable[[Tensor, Tensor], None] | None = None) -> tuple[Tensor, Tensor]:
    """By AITER's kernel, or ``kernel`` of its signature; the caller checks its ids."""
    if kernel is None:
        import aiter

        kernel = aiter.greedy_sample
    out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    kernel(out, logits)
    return out, _faults(logits.amax(dim=-1))


def fits_aiter(logits: Tensor) -> bool:
    """Whether AITER's kernel reads these logits rightly: whole aligned vectors, 32-bit offsets, the default stream."""
    rows, vocab = logits.shape
    readable = logits.dtype in FLOATS and logits.stride(1) == 1 and vocab > 0 and vocab % AITER_VECTOR == 0
    aligned = logits.stride(0) % AITER_VECTOR == 0 and logits.storage_offset() % AITER_VECTOR == 0
    # AITER 0.1.7 launches on the default stream, whichever is current.
    in_order = logits.is_meta or current_platform.is_default_stream()
    return readable and aligned and 0 < rows and rows * logits.stride(0) < 2**31 and in_order


def greedy_triton(logits: Tensor) -> tuple[Tensor, Tensor]:
    from sglang.kernels.ops.sampling.greedy_triton import greedy_kernel, greedy_merge_kernel

    rows, vocab = logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    faults = torch.empty_like(ids)
    if rows == 0:
        return ids, faults
    block = min(BLOCK, next_power_of_2(vocab))
    chunks = cdiv(vocab, block)
    keys = None if chunks == 1 else torch.empty(rows, chunks, dtype=torch.int64, device=logits.device)
    greedy_kernel[(rows * chunks,)](
        logits, keys, ids, faults, vocab, logits.stride(0), logits.stride(1), chunks,
        IS_LAST=chunks == 1, BLOCK=block, num_warps=4, **early_start(),
    )  # fmt: skip
    if keys is not None:
        greedy_merge_kernel[(rows,)](
            keys, ids, faults, chunks, BLOCK=next_power_of_2(chunks), num_warps=1, **early_start()
        )
    return ids, faults


def _accepts(logits: Tensor) -> bool:
    return logits.dtype in FLOATS and logits.shape[1] > 0


greedy_sample = Op(
    "sampling.greedy",
    aiter_impl(greedy_aiter, fits_aiter),
    triton_impl(greedy_triton, _accepts),
    Impl("torch", greedy_torch),
)

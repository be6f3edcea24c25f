"""Greedy choice: the index of the largest logit of each row."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, aiter_impl, cdiv, next_power_of_2, triton_impl
from sglang.kernels.spec import Case, Impl, Op
from sglang.srt.platforms import current_platform

# AITER reads rows in vectors of this many logits: of a shorter last one it takes what lies past V for 0.
AITER_VECTOR = 16
# Programs that fill a GPU, and logits that one program reads at once.
TARGET_PROGRAMS = 264
TRITON_BLOCK = 2048


def greedy_torch(logits: Tensor) -> Tensor:
    """Index of the largest logit in each row.

    logits [B, V] float, any strides -> [B] int64 (AITER: int32), in [0, V); ties take the first. A row of -inf gives 0;
    a row that holds NaN gives the index of its first NaN (AITER: any integer for either). The caller refuses such rows
    and every id outside [0, V), see ``Sampler``.
    """
    if logits.shape[0] == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    best = logits.amax(dim=-1, keepdim=True)
    # torch.argmax leaves ties open; the first index of the maximum is made explicit.
    hits = (logits == best) | logits.isnan()
    return hits.to(torch.uint8).argmax(dim=-1)


def greedy_aiter(logits: Tensor, kernel: Callable[[Tensor, Tensor], None] | None = None) -> Tensor:
    """By AITER's kernel, or ``kernel`` of its signature; the caller judges its ids."""
    if kernel is None:
        import aiter

        kernel = aiter.greedy_sample
    out = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
    kernel(out, logits)
    return out


def fits_aiter(logits: Tensor) -> bool:
    """Whether AITER's kernel reads these logits rightly: whole aligned vectors, 32-bit offsets, the default stream."""
    rows, vocab = logits.shape
    readable = logits.dtype in FLOATS and logits.stride(1) == 1 and vocab > 0 and vocab % AITER_VECTOR == 0
    aligned = logits.stride(0) % AITER_VECTOR == 0 and logits.storage_offset() % AITER_VECTOR == 0
    # AITER 0.1.7 launches on the default stream, whichever is current.
    in_order = logits.is_meta or current_platform.is_default_stream()
    return readable and aligned and 0 < rows and rows * logits.stride(0) < 2**31 and in_order


def greedy_triton(logits: Tensor) -> Tensor:
    from sglang.kernels.ops.sampling.greedy_triton import greedy_kernel, greedy_merge_kernel

    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if rows == 0:
        return out
    block = min(TRITON_BLOCK, next_power_of_2(vocab))
    blocks = cdiv(vocab, block)
    steps = cdiv(blocks, min(blocks, cdiv(TARGET_PROGRAMS, rows)))
    splits = cdiv(blocks, steps)
    keys = out if splits == 1 else torch.empty(rows, splits, dtype=torch.int64, device=logits.device)
    greedy_kernel[(rows * splits,)](
        logits, keys, vocab, logits.stride(0), logits.stride(1), splits, steps,
        IS_LAST=splits == 1, BLOCK=block, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        greedy_merge_kernel[(rows,)](keys, out, splits, BLOCK=next_power_of_2(splits), num_warps=1)
    return out


def _accepts(logits: Tensor) -> bool:
    return logits.dtype in FLOATS and logits.shape[1] > 0


def _cases() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, vocab in ((1, 1), (1, 32000), (3, 151), (64, 129280 // 64), (0, 32)):
        yield Case(f"{rows}x{vocab}", (torch.randn(rows, vocab, generator=generator),))
    ties = torch.zeros(4, 33)
    ties[1, 7] = ties[1, 20] = 5.0
    ties[2, 32] = ties[2, 0] = 1e4
    ties[3] = -1e4
    yield Case("ties", (ties,))
    ugly = torch.randn(4, 65, generator=generator)
    ugly[0] = float("-inf")
    ugly[1, 3] = float("nan")
    ugly[2] = float("nan")
    ugly[3, 5:] = float("-inf")
    yield Case("inf-nan", (ugly,))
    yield Case("strided", (torch.randn(40, 6, generator=generator).t(),))


greedy_sample = Op(
    "sampling.greedy",
    aiter_impl(greedy_aiter, fits_aiter),
    triton_impl(greedy_triton, _accepts),
    Impl("torch", greedy_torch),
    cases=_cases,
)

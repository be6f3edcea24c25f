"""The mixing matrix of hyper-connections with its gradient: two Triton kernels on a GPU, plain torch elsewhere.

Twenty iterations over matrices of 4 by 4 are hundreds of kernels in torch, most of a small model's step.
"""

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU without Triton
    triton = None

TOKENS = 64


def sinkhorn_torch(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Softmax over the last dimension of [..., n, n], then columns and rows scaled to sum 1 in turn."""
    matrix = logits.softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


if triton is not None:

    @triton.jit
    def _forward(logits, matrices, row_sums, column_sums, count, eps, ITERATIONS: tl.constexpr, TOKENS: tl.constexpr):
        tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        four = tl.arange(0, 4)
        at = tokens[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
        inside = (tokens < count)[:, None, None]
        x = tl.load(logits + at, mask=inside, other=0.0)
        x = tl.exp(x - tl.max(x, 2)[:, :, None])
        x = x / tl.sum(x, 2)[:, :, None] + eps
        vector = tokens[:, None] * 4 + four[None, :]
        kept = (tokens < count)[:, None]
        columns = tl.sum(x, 1) + eps
        tl.store(column_sums + vector, columns, mask=kept)
        x = x / columns[:, None, :]
        for i in range(1, ITERATIONS):
            rows = tl.sum(x, 2) + eps
            tl.store(row_sums + i * count * 4 + vector, rows, mask=kept)
            x = x / rows[:, :, None]
            columns = tl.sum(x, 1) + eps
            tl.store(column_sums + i * count * 4 + vector, columns, mask=kept)
            x = x / columns[:, None, :]
        tl.store(matrices + at, x, mask=inside)

    @triton.jit
    def _backward(
        logits, matrices, row_sums, column_sums, grads, out, count, eps, ITERATIONS: tl.constexpr, TOKENS: tl.constexpr
    ):
        # Where y = x / s and s = sum(x) + eps: dx = (dy - sum(dy y)) / s, and x = y s.
        tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
        four = tl.arange(0, 4)
        at = tokens[:, None, None] * 16 + four[None, :, None] * 4 + four[None, None, :]
        inside = (tokens < count)[:, None, None]
        y = tl.load(matrices + at, mask=inside, other=0.0)
        dy = tl.load(grads + at, mask=inside, other=0.0)
        vector = tokens[:, None] * 4 + four[None, :]
        kept = (tokens < count)[:, None]
        for k in range(1, ITERATIONS):
            i = ITERATIONS - k
            columns = tl.load(column_sums + i * count * 4 + vector, mask=kept, other=1.0)
            dy = (dy - tl.sum(dy * y, 1)[:, None, :]) / columns[:, None, :]
            y = y * columns[:, None, :]
            rows = tl.load(row_sums + i * count * 4 + vector, mask=kept, other=1.0)
            dy = (dy - tl.sum(dy * y, 2)[:, :, None]) / rows[:, :, None]
            y = y * rows[:, :, None]
        columns = tl.load(column_sums + vector, mask=kept, other=1.0)
        dy = (dy - tl.sum(dy * y, 1)[:, None, :]) / columns[:, None, :]
        x = tl.load(logits + at, mask=inside, other=0.0)
        x = tl.exp(x - tl.max(x, 2)[:, :, None])
        x = x / tl.sum(x, 2)[:, :, None]
        tl.store(out + at, x * (dy - tl.sum(dy * x, 2)[:, :, None]), mask=inside)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, iterations: int, eps: float) -> Tensor:
        logits = logits.contiguous()
        count = logits.numel() // 16
        matrices = torch.empty_like(logits)
        sums = logits.new_empty(2, iterations, count, 4)
        grid = (triton.cdiv(count, TOKENS),)
        _forward[grid](logits, matrices, sums[0], sums[1], count, eps, ITERATIONS=iterations, TOKENS=TOKENS)
        ctx.save_for_backward(logits, matrices, sums)
        ctx.iterations, ctx.eps = iterations, eps
        return matrices

    @staticmethod
    def backward(ctx: Any, grads: Tensor) -> tuple[Tensor, None, None]:
        logits, matrices, sums = ctx.saved_tensors
        out, count = torch.empty_like(logits), logits.numel() // 16
        grid = (triton.cdiv(count, TOKENS),)
        _backward[grid](
            logits, matrices, sums[0], sums[1], grads.contiguous(), out, count, ctx.eps,
            ITERATIONS=ctx.iterations, TOKENS=TOKENS,
        )  # fmt: skip
        return out, None, None


_use_kernels = False


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """`sinkhorn_torch` of float32 logits [..., n, n], by the kernels once `choose_kernels` found them right."""
    return _Sinkhorn.apply(logits, iterations, eps) if _use_kernels else sinkhorn_torch(logits, iterations, eps)


def choose_kernels(device: torch.device) -> str:
    """Use the kernels, for matrices of 4 by 4 alone, if they give torch's values and gradients; says what is used."""
    global _use_kernels
    if device.type != "cuda" or triton is None:
        return "Sinkhorn by torch"
    logits = [2 * torch.randn(1000, 4, 4, device=device)] * 2
    logits = [part.clone().requires_grad_() for part in logits]
    try:
        found = [run(part, 20, 1e-6) for run, part in zip((_Sinkhorn.apply, sinkhorn_torch), logits)]
        weights = torch.randn_like(found[0])
        for part in found:
            (part * weights).sum().backward()
        worst = max((a - b).abs().max().item() for a, b in (found, [part.grad for part in logits]))
    except Exception as error:  # whatever a compiler of another version raises: the run must not end by it
        return f"Sinkhorn by torch, as its kernels failed: {error!r:.200}"
    _use_kernels = worst < 1e-4
    return f"Sinkhorn by {'kernels' if _use_kernels else 'torch'}; the kernels' largest difference is {worst:.1g}"

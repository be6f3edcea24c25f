"""Muon, the optimizer that DeepSeek V4 was trained with, such that its step can be part of a CUDA graph."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Newton-Schulz steps and coefficients of the first ones (K. Jordan, "Muon", 2024).
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95
# An update of this size has the root mean square of AdamW's, so both take one learning rate (Moonlight, section 2.2).
SCALE = 0.2


class Muon:
    """Steps of equal size in all directions of a matrix, from the momentum of its gradient.

    params: matrices, or stacks of them [..., M, N]; lr: a tensor of one number, read at each step. torch.optim.Muon
    takes no stacks, and reads lr on the host. A parameter without a gradient is left as it is.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: Tensor, weight_decay: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay
        self.momenta = {param: torch.zeros_like(param) for param in params}

    @torch.no_grad()
    def step(self) -> None:
        by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for param in self.momenta:
            if param.grad is not None:
                by_shape.setdefault(tuple(param.shape[-2:]), []).append(param)
        for shape, params in by_shape.items():
            momenta = [self.momenta[param] for param in params]
            torch._foreach_mul_(momenta, MOMENTUM)
            torch._foreach_add_(momenta, [param.grad for param in params])
            ahead = torch._foreach_add([param.grad for param in params], momenta, alpha=MOMENTUM)
            stack = torch.cat([part.reshape(-1, *shape) for part in ahead])
            updates = orthogonal(stack) * (SCALE * max(shape) ** 0.5 * self.lr)
            parts = updates.split([param.numel() // (shape[0] * shape[1]) for param in params])
            for param, update in zip(params, parts, strict=True):
                param.mul_(1 - self.lr * self.weight_decay).sub_(update.view_as(param))


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows or columns, roughly: [K, M, N] float32 -> the same."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return (x.mT if tall else x).float()

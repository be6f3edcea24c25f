"""A checkpoint of random numbers that behaves like a trained one: norms 1, matrices scaled by their fan-in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch

from sglang.srt.models.checkpoint_model import CheckpointModel


def iterate_dummy(model: CheckpointModel, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (checkpoint name, full tensor) that ``model`` expects.

    A matrix is N(0, 1/sqrt(fan_in)), an 8-bit one N(0, 16) with scales 1/(16 sqrt(fan_in)); a vector has its own mean
    and deviation (norms mean 1, router bias N(0, 0.05)). A table of ids counts up from row to row.
    Numbers are drawn on the device of the model. They depend only on ``seed``, the tensor's name and the kind of
    device, so every tensor-parallel size serves the same model.
    """
    device = next(model.parameters()).device
    for name, expected in model.checkpoint_tensors().items():
        ids_below = expected.leaves[0].ids_below
        if ids_below is not None:
            count = math.prod(expected.shape)
            yield name, (torch.arange(count, device=device) % ids_below).view(expected.shape)
            continue
        mean, deviation = expected.fill if expected.fill is not None else (0.0, fan_in(expected.shape) ** -0.5)
        tensor = torch.full(expected.shape, mean, device=device, dtype=torch.float32)
        if deviation and device.type != "meta":  # meta tensors have no contents
            generator = torch.Generator(device=device).manual_seed(_seed_of(name, seed))
            noise = torch.randn(expected.shape, generator=generator, device=device, dtype=torch.float32)
            tensor.add_(noise, alpha=deviation)
        parts = {"": tensor} if expected.encode is None else expected.encode(tensor)
        yield from ((name + suffix, part) for suffix, part in parts.items())


def fan_in(shape: tuple[int, ...]) -> int:
    """Inputs that one output sums over: all dimensions after the first."""
    return math.prod(shape[1:])


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")

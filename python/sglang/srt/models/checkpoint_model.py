"""A model that knows its checkpoint: every tensor it expects, by name and shape, and how each is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.weights import ShardId, WeightShapeError, full_shape

logger = logging.getLogger(__name__)

_READABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PackedModules = Mapping[str, tuple[tuple[str, ShardId], ...]]


class WeightLoadError(ValueError):
    """A checkpoint cannot be read, or does not fit the model; the message lists every tensor concerned."""


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor that the checkpoint must hold: its full shape, the dtype it is kept in, and how it is taken.

    ``fill`` is mean and standard deviation of a dummy checkpoint, None for a matrix drawn by its fan-in.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[torch.Tensor], None]
    fill: tuple[float, float] | None = None


@dataclass(frozen=True)
class StackedTensor:
    """Another form of the checkpoint: one tensor that stands for the tensors named ``covers``."""

    covers: tuple[str, ...]
    load: Callable[[torch.Tensor], None]


class CheckpointModel(nn.Module):
    """Base of the served models.

    ``packed_modules`` maps the name of a merged module to its checkpoint modules and their shard ids, e.g.
    ``{"gate_up_proj": (("gate_proj", 0), ("up_proj", 1))}``. Routed experts are found by their class.
    """

    packed_modules: ClassVar[PackedModules] = {}

    def checkpoint_name(self, name: str) -> str | None:
        """The name in ``checkpoint_tensors`` of the file's tensor ``name``; None when the model has no use for it."""
        return name

    def post_load(self) -> None:
        """Derive what is computed from loaded weights; called once after loading."""

    def checkpoint_tensors(self) -> dict[str, CheckpointTensor]:
        """Every tensor that must be loaded, by checkpoint name, experts one by one."""
        expected: dict[str, CheckpointTensor] = {}
        for path, module in self.named_modules():
            if isinstance(module, FusedMoE):
                for leaf, shape, load in module.expert_tensors():
                    expected[f"{path}.{leaf}"] = CheckpointTensor(shape, module.w13_weight.dtype, load)
        for path, param in self.named_parameters():
            parent, _, leaf = path.rpartition(".")
            if isinstance(self.get_submodule(parent), FusedMoE):
                continue
            before, _, module_name = parent.rpartition(".")
            for part, shard_id in self.packed_modules.get(module_name, ((module_name, None),)):
                name = ".".join(piece for piece in (before, part, leaf) if piece)
                expected[name] = _checkpoint_tensor(param, shard_id)
        return expected

    def stacked_tensors(self) -> dict[str, StackedTensor]:
        """The stacked form of the routed experts, by checkpoint name."""
        return {
            f"{path}.{leaf}": StackedTensor(tuple(f"{path}.{name}" for name in covers), load)
            for path, module in self.named_modules()
            if isinstance(module, FusedMoE)
            for leaf, covers, load in module.fused_tensors()
        }

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take every tensor of a checkpoint (name, full tensor), in any order, cast to the model's dtype.

        Raises WeightLoadError that lists all missing, unexpected, repeated and wrongly shaped tensors.
        """
        expected, stacked = self.checkpoint_tensors(), self.stacked_tensors()
        missing = set(expected)
        unexpected, repeated, misfits = [], [], []
        ignored = 0
        for file_name, tensor in weights:
            name = self.checkpoint_name(file_name)
            if name is None:
                ignored += 1
                continue
            target: CheckpointTensor | StackedTensor | None = expected.get(name) or stacked.get(name)
            if target is None:
                unexpected.append(file_name)
                continue
            covered = {name} if isinstance(target, CheckpointTensor) else set(target.covers)
            if not covered <= missing:
                repeated.append(file_name)
            missing -= covered
            problem = _take(target, tensor)
            if problem is not None:
                misfits.append(f"{file_name}: {problem}")
        if missing or unexpected or repeated or misfits:
            raise WeightLoadError(self._describe(missing, unexpected, repeated, misfits))
        if ignored:
            logger.info("ignored %d checkpoint tensors that %s has no use for", ignored, type(self).__name__)
        self.post_load()

    def _describe(self, missing: set[str], unexpected: list[str], repeated: list[str], misfits: list[str]) -> str:
        lines = [f"the checkpoint does not fit {type(self).__name__}; compare its config.json with its tensors:"]
        for title, names in (
            ("missing", sorted(missing)),
            ("unexpected", sorted(unexpected)),
            ("given twice", sorted(repeated)),
            ("wrong shape or dtype", sorted(misfits)),
        ):
            if names:
                lines.append(f"  {title} ({len(names)}):")
                lines += [f"    {name}" for name in names]
        return "\n".join(lines)


def _checkpoint_tensor(param: nn.Parameter, shard_id: ShardId) -> CheckpointTensor:
    def load(tensor: torch.Tensor) -> None:
        param.weight_loader(param, tensor, shard_id)  # type: ignore[attr-defined]

    return CheckpointTensor(full_shape(param, shard_id), param.dtype, load, param.fill)  # type: ignore[attr-defined]


def _take(target: CheckpointTensor | StackedTensor, tensor: torch.Tensor) -> str | None:
    """Load the tensor; None, or why it does not fit."""
    if tensor.dtype not in _READABLE_DTYPES:
        return f"dtype {str(tensor.dtype).removeprefix('torch.')} is not supported (quantised checkpoint?)"
    try:
        target.load(tensor)
    except WeightShapeError as error:
        return str(error)
    return None

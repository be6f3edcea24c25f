"""A model that knows its checkpoint: every tensor it expects, by name and shape, and how each is taken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from sglang.srt.configs.quantization import BlockShape
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.weights import (
    PLAIN,
    Encoder,
    Leaf,
    ShardId,
    WeightFormatError,
    WeightShapeError,
    check_shape,
    full_shape,
)

logger = logging.getLogger(__name__)

# Names of the tensors that a stacked one holds, by expert.
Stack = list[list[str]]
PackedModules = Mapping[str, tuple[tuple[str, ShardId], ...]]


class WeightLoadError(ValueError):
    """A checkpoint cannot be read, or does not fit the model; the message lists every tensor concerned."""


@dataclass(frozen=True)
class CheckpointTensor:
    """One matrix or vector that the checkpoint must hold: its full shape, and how it is taken, its partner after it.

    fill: mean and standard deviation of a dummy checkpoint, None for a matrix drawn by its fan-in. leaves: the tensors
    in which it may come. encode: what a dummy checkpoint holds of what was drawn; None: just that.
    """

    shape: tuple[int, ...]
    load: Callable[..., None]
    fill: tuple[float, float] | None = None
    leaves: tuple[Leaf, ...] = (PLAIN,)
    encode: Encoder | None = None

    @classmethod
    def of(cls, param: nn.Parameter, shard_id: ShardId, load: Callable[..., None]) -> CheckpointTensor:
        """What ``param`` says of the tensor that holds ``shard_id``."""
        meta: Any = param
        return cls(full_shape(param, shard_id), load, meta.fill, meta.leaves, meta.encode)

    def leaf_of(self, suffix: str, dtype: torch.dtype) -> Leaf:
        """Which leaf a tensor is; raises WeightFormatError where none has its dtype."""
        leaves = [leaf for leaf in self.leaves if leaf.suffix == suffix]
        for leaf in leaves:
            if dtype in leaf.dtypes:
                return leaf
        known = ", ".join(_short(each) for leaf in leaves for each in leaf.dtypes)
        raise WeightFormatError(f"dtype {_short(dtype)} is not supported here, only {known}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class CheckpointModel(nn.Module):
    """Base of the served models.

    ``packed_modules`` maps the name of a merged module to its checkpoint modules and their shard ids, e.g.
    ``{"gate_up_proj": (("gate_proj", 0), ("up_proj", 1))}``. Routed experts are found by their class.
    """

    packed_modules: ClassVar[PackedModules] = {}
    # Slots of the routed experts' weights that hold shared ones, in every layer that has any.
    num_fused_shared_experts = 0

    def checkpoint_name(self, name: str) -> str | None:
        """The name in ``checkpoint_tensors`` of the file's tensor ``name``; None when the model has no use for it."""
        return name

    def post_load_weights(self) -> None:
        """Derive what is computed from loaded weights; called once after loading."""

    def checkpoint_tensors(self) -> dict[str, CheckpointTensor]:
        """Every tensor that must be loaded, by checkpoint name, experts one by one."""
        expected: dict[str, CheckpointTensor] = {}
        for path, module in self.named_modules():
            if isinstance(module, FusedMoE):
                for leaf, name, expert_id, param in module.expert_tensors():
                    load = partial(module.load_expert, name, expert_id)
                    expected[f"{path}.{leaf}"] = CheckpointTensor.of(param, name, load)
        for path, param in self.named_parameters():
            parent, _, leaf = path.rpartition(".")
            if isinstance(self.get_submodule(parent), FusedMoE) or not param.full_shapes:  # type: ignore[attr-defined]
                continue
            before, _, module_name = parent.rpartition(".")
            for part, shard_id in self.packed_modules.get(module_name, ((module_name, None),)):
                name = ".".join(piece for piece in (before, part, leaf) if piece)
                expected[name] = CheckpointTensor.of(param, shard_id, _loader(param, shard_id))
        return expected

    def stacked_tensors(self) -> dict[str, Stack]:
        """The stacked form of the routed experts, by checkpoint name: the tensors that it holds of each expert."""
        return {
            f"{path}.{leaf}": [[f"{path}.{name}" for name in expert] for expert in experts]
            for path, module in self.named_modules()
            if isinstance(module, FusedMoE)
            for leaf, experts in module.fused_tensors().items()
        }

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], own_names: bool = False) -> None:
        """Take every tensor of a checkpoint (name, full tensor), in any order, cast to the model's dtype.

        own_names: the names are those of ``checkpoint_tensors``, as no file has them for some models.
        Raises WeightLoadError that lists all missing, unexpected, repeated and wrongly shaped tensors.
        """
        known, slots = self.num_fused_shared_experts, {m.num_shared for m in self.modules() if isinstance(m, FusedMoE)}
        assert slots <= {known}, f"layers have {slots} slots for shared experts, and the loader knows of {known}"
        loading, stacked = _Loading(self.checkpoint_tensors()), self.stacked_tensors()
        ignored = 0
        for file_name, tensor in weights:
            name = file_name if own_names else self.checkpoint_name(file_name)
            if name is None:
                ignored += 1
            elif name in stacked:
                loading.take_stack(stacked[name], file_name, tensor)
            else:
                loading.take(name, file_name, tensor)
        problems = loading.problems()
        if any(problems.values()):
            raise WeightLoadError(self._describe(problems))
        if ignored:
            logger.info("ignored %d checkpoint tensors that %s does not use", ignored, type(self).__name__)
        for module in self.modules():
            if isinstance(module, FusedMoE):
                module.quant_method.process_weights_after_loading(module)
        self.post_load_weights()

    def _describe(self, problems: Mapping[str, set[str]]) -> str:
        lines = [f"the checkpoint does not fit {type(self).__name__}; compare its config.json with its tensors:"]
        for title, names in problems.items():
            if names:
                lines.append(f"  {title} ({len(names)}):")
                lines += [f"    {name}" for name in sorted(names)]
        return "\n".join(lines)


def _loader(param: nn.Parameter, shard_id: ShardId) -> Callable[..., None]:
    def load(tensor: torch.Tensor, *scale: torch.Tensor) -> None:
        param.weight_loader(param, tensor, shard_id, *scale)  # type: ignore[attr-defined]

    return load


class _Loading:
    """One pass over a checkpoint: what was seen, what does not fit, tensors and partners that await each other."""

    def __init__(self, expected: Mapping[str, CheckpointTensor]) -> None:
        self._expected = expected
        # Name of each tensor that may come -> the matrix that it belongs to, and its suffix.
        self._matrix_of = {
            name + leaf.suffix: (name, leaf.suffix) for name, target in expected.items() for leaf in target.leaves
        }
        self._seen: set[str] = set()
        # Of each matrix, the tensors that await their partner, by suffix.
        self._halves: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
        self._unexpected: set[str] = set()
        self._repeated: set[str] = set()
        self._misfits: set[str] = set()

    def take_stack(self, stack: Stack, file_name: str, tensor: torch.Tensor) -> None:
        """Take a tensor [E, rows, columns] whose rows are those of the tensors that ``stack`` names for each expert."""
        names = [name for expert in stack for name in expert]
        rows, columns = self._expected[names[0]].shape
        try:
            check_shape(tensor, (len(stack), len(stack[0]) * rows, columns))
        except WeightShapeError as error:
            self._seen.update(names)
            self._misfits.add(f"{file_name}: {error}")
            return
        for name, part in zip(names, tensor.reshape(-1, rows, columns), strict=True):
            self.take(name, file_name, part)

    def take(self, name: str, file_name: str, tensor: torch.Tensor) -> None:
        """Load a tensor, or keep it until its partner comes."""
        if name not in self._matrix_of:
            self._unexpected.add(file_name)
            return
        if name in self._seen:
            self._repeated.add(file_name)
            return
        self._seen.add(name)
        matrix, suffix = self._matrix_of[name]
        target = self._expected[matrix]
        try:
            leaf = target.leaf_of(suffix, tensor.dtype)
            _check(leaf, target.shape, tensor)
            if leaf.partner is None:
                target.load(tensor)
                return
        except (WeightShapeError, WeightFormatError) as error:
            self._misfits.add(f"{file_name}: {error}")
            return
        halves = self._halves.setdefault(matrix, {})
        halves[suffix] = (file_name, tensor)
        if leaf.partner in halves:
            del self._halves[matrix]
            self._load_pair(target, halves)

    def _load_pair(self, target: CheckpointTensor, halves: dict[str, tuple[str, torch.Tensor]]) -> None:
        file_name, tensor = halves.pop("")
        ((_, partner),) = halves.values()
        try:
            target.load(tensor, partner)
        except (WeightShapeError, WeightFormatError) as error:
            self._misfits.add(f"{file_name}: {error}")

    def problems(self) -> dict[str, set[str]]:
        """What was wrong, by title; empty sets when all is loaded."""
        missing = set(self._expected) - self._seen
        unexpected = set(self._unexpected)
        for matrix, halves in self._halves.items():
            for suffix, (file_name, tensor) in halves.items():
                if suffix == "":
                    partner = self._expected[matrix].leaf_of(suffix, tensor.dtype).partner
                    missing |= {f"{matrix}{partner}"} - self._seen
                elif matrix in self._seen and "" not in halves:
                    unexpected.add(f"{file_name} (its tensor is not quantised)")
        return {
            "missing": missing,
            "unexpected": unexpected,
            "given twice": self._repeated,
            "wrong shape or dtype": self._misfits,
        }


def _check(leaf: Leaf, shape: tuple[int, ...], tensor: torch.Tensor) -> None:
    """Raise WeightShapeError or WeightFormatError unless ``tensor`` is ``leaf`` of a matrix of ``shape``."""
    across = BlockShape(leaf.block.columns, leaf.block.rows)
    if leaf.block != across and tuple(tensor.shape) == across.entries(shape):
        raise WeightFormatError(
            f"shape {list(tensor.shape)} is packed along the wrong axis: an entry stands for {leaf.block.columns} "
            f"numbers of one row, which makes {list(leaf.block.entries(shape))}. Convert the checkpoint again"
        )
    check_shape(tensor, leaf.block.entries(shape))
    if tensor.is_meta:
        return
    # In a matrix NaN reaches the logits, and its request ends. In a router's bias it would only steer the choice.
    if tensor.dim() == 1 and bool(tensor.isnan().any()):
        raise WeightFormatError("it contains NaN: the checkpoint is damaged, download it again")
    if leaf.ids_below is not None and not (0 <= int(tensor.min()) and int(tensor.max()) < leaf.ids_below):
        raise WeightFormatError(f"it contains numbers outside [0, {leaf.ids_below})")

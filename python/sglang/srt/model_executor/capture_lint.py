"""What a captured step must not do: a replay repeats kernels, but neither host values nor host decisions.

Every input of a captured region must be device memory that persists. The lint runs the step under torch's dispatcher
and raises at the first operation that breaks this rule. Kernels that bypass the dispatcher (Triton, vendor packages)
take only device tensors and decide nothing on the host.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Methods that read a host tensor without the dispatcher; of a device tensor they first make a copy, which it sees.
_HOST_READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__)
_DATA_DEPENDENT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_TORCH = str(Path(torch.__file__).parent)
# On a CPU these stand in for kernels.
_REFERENCES = (str(Path("sglang", "kernels", "ops")), str(Path("sglang", "test", "fakes")))


class CaptureViolation(RuntimeError):
    """A step does something that a graph cannot replay; the message names the operation and the line."""


# Violations so far of a step that runs to its end; None: the first violation raises.
_collected: ContextVar[list[CaptureViolation] | None] = ContextVar("collected", default=None)


@contextmanager
def collect_violations() -> Iterator[None]:
    """Collect violations inside the block, and raise the first one after it, unless another error ended the block.

    A rank that stopped in the middle of a step would leave the other ranks waiting in its collectives.
    """
    violations: list[CaptureViolation] = []
    token = _collected.set(violations)
    try:
        yield
    finally:
        _collected.reset(token)
    if violations:
        raise violations[0]


def _report(name: str, problem: str, stack: traceback.StackSummary) -> None:
    violation, collected = CaptureViolation(_describe(name, problem, stack)), _collected.get()
    if collected is None:
        raise violation
    collected.append(violation)


class HostList(list[int]):
    """A host list that a captured step must not read, because a replay would see the values of the capture."""


def _watched(name: str) -> Callable[..., Any]:
    def read(self: HostList, *args: Any) -> Any:
        _report("a host-side list of the batch", "is read", traceback.extract_stack())
        return getattr(list, name)(self, *args)

    return read


for _name in ("__getitem__", "__iter__", "__len__", "__contains__", "__eq__"):
    setattr(HostList, _name, _watched(_name))


@contextmanager
def capture_lint(device: torch.device) -> Iterator[None]:
    """Inside the block, raise CaptureViolation for what a captured step on ``device`` may not do.

    On a CPU, where nothing is captured, it checks the step except for the insides of ops, because torch references may
    read what kernels would not.
    """
    with _HostReads(device), _Lint(device):
        yield


class _HostReads(TorchFunctionMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _HOST_READS:
            _report_outside_references(self._device, f"Tensor.{func.__name__}", "reads a tensor on the host")
        return func(*args, **(kwargs or {}))


class _Lint(TorchDispatchMode):
    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            # Inference mode passes composite operations undivided: check their parts.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            problem = find_problem(func, args, kwargs)
            if problem is not None:
                _report_outside_references(self._device, str(func), problem)
        return func(*args, **kwargs)


def find_problem(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why the operation cannot be captured; None when it can."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    # A host tensor without dimensions is a number, which becomes a constant of the launch.
    on_host = any(_is_host(tensor.device) and tensor.ndim > 0 for tensor in tensors)
    if func is aten.lift_fresh.default and args[0].ndim > 0:
        return "makes a tensor from host values"
    if func is aten._to_copy.default or func is aten.copy_.default:
        target = kwargs.get("device", args[0].device) if func is aten._to_copy.default else args[1].device
        return "copies between host and device" if _is_host(args[0].device) != _is_host(target) else None
    if on_host and not all(_is_host(tensor.device) for tensor in tensors):
        return "takes a host tensor"
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
        return "is indexed by a mask, whose count the host must know (use masked_fill or where)" if masks else None
    if func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return None
    if any(tag in func.tags for tag in _DATA_DEPENDENT):
        return "depends on data that the host must read"
    return None


def _is_host(device: torch.device | str) -> bool:
    return torch.device(device).type == "cpu"


def _report_outside_references(device: torch.device, name: str, problem: str) -> None:
    """Report the line that is running, unless it is inside a torch reference or the fake of a kernel on a CPU."""
    if device.type == "cpu" and _in_reference():
        return
    _report(name, problem, traceback.extract_stack())


def _in_reference() -> bool:
    """Whether a calling frame stands in for a kernel. Reads no source lines of the stack, which would be slow."""
    return any(home in frame.f_code.co_filename for frame, _ in traceback.walk_stack(None) for home in _REFERENCES)


def _describe(name: str, problem: str, stack: traceback.StackSummary) -> str:
    own = [frame for frame in stack if not frame.filename.startswith(_TORCH) and frame.filename != __file__]
    line = own[-1]
    return f"{name} {problem}, at {line.filename}:{line.lineno} in {line.name}: {line.line}"

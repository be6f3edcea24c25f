"""What each decoder layer launches in a decode step, counted without a GPU: Triton kernels and torch's own, in order.

    python benchmark/step/count_launches.py [--models v2lite qwen35 v3-fp8] [--batch-size 1] [--arch gfx942]

The models are those that the AMD gate walks (sglang.test.amd_gate.shape_walk), on tensors without contents: ops choose
as on the machine that --arch names. A library may launch more than one kernel for a call of torch.
"""

from __future__ import annotations

import argparse
import contextlib
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang.kernels.registry import REGISTRY
from sglang.srt.platforms import override_platform
from sglang.test.amd_gate import shape_walk
from sglang.test.amd_gate.driver import CompileOnlyDriver, compile_only
from sglang.test.amd_gate.walk import ShapeOnlyPlatform
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.thread_ranks import override_tp_group

# Calls of torch that make tensors without launching anything, next to those whose schema says that they give a view.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


class Launches(TorchDispatchMode):
    """Within a layer, names of what is launched: torch's calls, and Triton's kernels between them."""

    def __init__(self, driver: CompileOnlyDriver) -> None:
        super().__init__()
        self._driver = driver
        self._seen = 0
        self._names: list[str] = []
        self.by_layer: dict[int, list[str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._take_kernels()
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and name not in (*ALLOCATIONS, "_unsafe_view"):
            self._names.append(f"torch {name}")
        return func(*args, **(kwargs or {}))

    def _take_kernels(self) -> None:
        self._names += [launch.kernel for launch in self._driver.launches[self._seen :]]
        self._seen = len(self._driver.launches)

    def watch(self, layers: torch.nn.ModuleList) -> None:
        """Keep what each layer launches in its newest forward."""

        def begin(module: torch.nn.Module, args: Any) -> None:
            self._take_kernels()
            self._names = []

        def end(module: torch.nn.Module, args: Any, output: Any) -> None:
            self._take_kernels()
            self.by_layer[numbers[module]], self._names = self._names, []

        numbers = {layer: number for number, layer in enumerate(layers)}
        for layer in layers:
            layer.register_forward_pre_hook(begin)
            layer.register_forward_hook(end)


def count(model: shape_walk.WalkedModel, arch: str, batch_size: int) -> dict[int, list[str]]:
    """Names of what each layer of the model launches in a decode step."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(override_platform(ShapeOnlyPlatform(arch)))
        stack.enter_context(fresh_decisions())
        REGISTRY.freeze()
        driver = stack.enter_context(compile_only(arch, lambda kernel, digest: True))  # to know names is enough
        size = model.settings.get("tp_size", 1)
        stack.enter_context(override_tp_group(shape_walk.ShapeOnlyGroup(size=size)))
        runners: list[shape_walk.ShapeRunner] = []
        shape_walk._load(model, stack, runners)
        stack.enter_context(shape_walk._PinsNothing())
        launches = Launches(driver)
        launches.watch(runners[0].model.model.layers)
        with launches:
            runners[0].decode(batch_size)
    return launches.by_layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [model.name for model in shape_walk.WALKED_MODELS]
    parser.add_argument("--models", nargs="+", choices=names, default=["v2lite", "qwen35", "v3-fp8"])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--arch", default="gfx942")
    args = parser.parse_args()
    for model in shape_walk.WALKED_MODELS:
        if model.name in args.models:
            for number, launched in count(model, args.arch, args.batch_size).items():
                print(f"{model.name} layer {number}: {len(launched)}\n    {', '.join(launched)}", flush=True)


if __name__ == "__main__":
    main()

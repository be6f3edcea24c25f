"""All ranks of a replica run the same implementation of each op, or none starts."""

from __future__ import annotations

from sglang.kernels.registry import REGISTRY, KernelConfigError
from sglang.srt.distributed.parallel_state import ProcessGroupHandle


def require_same_kernels(group: ProcessGroupHandle) -> None:
    """Raise KernelConfigError on every rank where the frozen choices, failures included, differ between ranks."""
    ops = [REGISTRY.ops[name] for name in sorted(REGISTRY.ops)]
    names = [[*(impl.name for impl in op.impls), "none"] for op in ops]
    ranks = group.all_gather_ints([known.index(REGISTRY.chosen(op)) for known, op in zip(names, ops, strict=True)])
    differing = []
    for op, known, choices in zip(ops, names, zip(*ranks, strict=True), strict=True):
        if len(set(choices)) > 1:
            shown = ", ".join(f"rank {rank} {known[choice]}" for rank, choice in enumerate(choices))
            differing.append(f"{op.name}: {shown}")
    if differing:
        raise KernelConfigError(
            f"ranks would run different implementations ({'; '.join(differing)}). Install the same packages and set "
            "the same variables for all ranks, or force one with SGLANG_KERNELS; each rank's log says why it lacks one."
        )

"""Which implementation of each op runs: static choice, forcing, fallbacks and failures on record."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from importlib import metadata
from types import ModuleType
from typing import Any

import torch

from sglang.kernels.impl import Impl, OpSpec
from sglang.srt.environ import envs
from sglang.srt.platforms import current_platform

logger = logging.getLogger(__name__)


# Former names of ops, which SGLANG_KERNELS takes too.
FORMER_NAMES = {
    "attention.table_decode": "attention.decode_attention",
    "attention.mla_table_decode": "attention.decode_attention",
    "attention.table_verify": "attention.decode_attention",
    "attention.mla_table_verify": "attention.decode_attention",
    "attention.verify_attention": "attention.decode_attention",
    "attention.mla_verify_attention": "attention.decode_attention",
    "attention.mla_decode_attention": "attention.decode_attention",
    "attention.mla_decode": "attention.decode_padded",
    "attention.mla_extend": "attention.extend_attention",
    "norm.gemma_rms_norm": "norm.rms_norm",
    "norm.fused_add_gemma_rms_norm": "norm.fused_add_rms_norm",
    "moe.topk_plain": "moe.topk",
    "moe.topk_grouped": "moe.topk",
    "moe.topk_biased_grouped": "moe.topk",
    "attention.paged_decode": "attention.decode_padded",
    "attention.paged_extend": "attention.extend_attention",
    "attention.ragged_extend": "attention.extend_ragged",
}


class KernelConfigError(ValueError):
    """SGLANG_KERNELS or a preferred backend names something that does not exist or cannot run here."""


@dataclass
class OpRecord:
    """The state of one op: the static verdict on each implementation, and fallbacks since."""

    chosen: str
    verdicts: dict[str, str]
    forced: bool = False
    calls_refused: Counter[str] = field(default_factory=Counter)
    disabled: dict[str, str] = field(default_factory=dict)


def probe_package(name: str) -> str | None:
    """None when ``name`` imports, else why not. Vendor packages fail with any exception, not only ImportError."""
    try:
        importlib.import_module(name)
    except Exception as error:  # the one probe of the tree; the reason is kept and shown
        return f"{type(error).__name__}: {error}"
    return None


def version_of(package: str) -> str:
    """The version that an imported package, or its distribution, states; "" if neither does."""
    said = getattr(sys.modules[package], "__version__", "")
    distributions = [] if said else metadata.packages_distributions().get(package, [])
    return str(said) or (metadata.version(distributions[0]) if distributions else "")


def is_older(version: str, wanted: tuple[int, ...]) -> bool:
    """Whether ``version`` comes before release ``wanted``, like its pre-releases (0.1.14.dev3, 0.1.14rc1)."""
    match = re.match(r"v?(\d+(?:\.\d+)*)(.*)", version)
    if match is None:
        return True
    release = tuple(int(part) for part in match[1].split("."))
    return release < wanted or (release == wanted and bool(re.match(r"[._-]?(dev|rc|a|b)", match[2])))


class KernelRegistry:
    """All ops of the process, and the frozen table of what runs."""

    def __init__(self) -> None:
        self.ops: dict[str, OpSpec] = {}
        self.records: dict[str, OpRecord] = {}
        self.serving = False
        # Modules of kernels that an implementation would run, and why they do not import.
        self.missing_modules: dict[str, str] = {}
        self._packages: dict[str, str | None] = {}
        self._preferred: dict[str, str | None] = {}
        self._forced: dict[str, str] | None = None

    def add(self, op: OpSpec) -> None:
        if op.name in self.ops:
            raise ValueError(f"op {op.name} is declared twice")
        self.ops[op.name] = op

    def load_all(self) -> list[ModuleType]:
        """The modules under ``sglang.kernels.ops``, except Triton bodies: importing them declares each op."""
        package = importlib.import_module("sglang.kernels.ops")
        found = pkgutil.walk_packages(package.__path__, package.__name__ + ".")
        return [importlib.import_module(module.name) for module in found if not module.name.endswith("_triton")]

    def prefer(self, groups: Collection[str], impl: str | None) -> None:
        """Put implementation ``impl`` first for the ops of ``groups`` that have it (``--attention-backend``).

        None restores the declared order. Ops that are decided are decided again; raises KernelConfigError like
        ``freeze``.
        """
        changed = {group for group in groups if self._preferred.get(group) != impl}
        self._preferred |= dict.fromkeys(changed, impl)
        for op in self.ops.values():
            if op.group in changed and op.table is not None:
                self._decide(op)

    def freeze(self) -> None:
        """Decide every op now; raises KernelConfigError when SGLANG_KERNELS cannot be applied."""
        self.load_all()
        forced = self._forcing()
        for name in forced:
            if name not in self.ops:
                raise KernelConfigError(f"SGLANG_KERNELS names op {name!r}. {_nearest(name, self.ops)}")
        for op in self.ops.values():
            self._decide(op)

    def start_serving(self) -> None:
        """End of warm-up: from here on a kernel that fails raises instead of being replaced."""
        self.serving = True

    def dispatch(self, op: OpSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the first candidate that accepts the arguments."""
        if op.table is None:
            self._decide(op)
        record = self.records[op.name]
        for impl in op.table or ():
            if impl.name in record.disabled:
                continue
            if impl.accepts is not None and not impl.accepts(*args, **kwargs):
                self._refused(op, impl, record)
                continue
            if self.serving or record.forced or impl.name == op.impls[-1].name or current_platform.is_capturing():
                return impl.fn(*args, **kwargs)
            try:
                return impl.fn(*args, **kwargs)
            except Exception as error:  # only in warm-up: the kernel is disabled, with one warning
                self._disable(op, impl, record, error)
        shapes = ", ".join(f"{arg.dtype} {tuple(arg.shape)}" for arg in args if isinstance(arg, torch.Tensor))
        raise KernelConfigError(
            f"SGLANG_KERNELS forces {op.name}={record.chosen}, which does not take these arguments: {shapes}. "
            "Take that entry out, or force the torch reference."
        )

    def chosen(self, op: OpSpec) -> str:
        """Name of the implementation that calls of ``op`` try first."""
        if op.table is None:
            self._decide(op)
        return self.records[op.name].chosen

    def report(self) -> list[dict[str, Any]]:
        """One row per op for /server_info and ``python -m sglang.kernels``."""
        return [
            {
                "op": name,
                "chosen": record.chosen,
                "forced": record.forced,
                "implementations": record.verdicts,
                "calls_refused": dict(record.calls_refused),
                "disabled": record.disabled,
            }
            for name, record in sorted(self.records.items())
        ]

    def _forcing(self) -> dict[str, str]:
        if self._forced is None:
            self._forced = parse_forcing(envs.SGLANG_KERNELS.get())
        return self._forced

    def _decide(self, op: OpSpec) -> None:
        verdicts = {impl.name: self._verdict(impl) for impl in op.impls}
        wanted = self._forcing().get(op.name)
        preferred = self._preferred.get(op.group)
        if wanted is not None:
            self._check_forced(op, wanted, preferred, verdicts)
            table = tuple(impl for impl in op.impls if impl.name == wanted)
        else:
            usable = [impl for impl in op.impls if verdicts[impl.name] == "ok"]
            table = tuple(sorted(usable, key=lambda impl: impl.name != preferred))
        self.records[op.name] = OpRecord(chosen=table[0].name, verdicts=verdicts, forced=wanted is not None)
        op.set_table(tuple(replace(impl, fn=current_platform.kernel(impl.fn)) for impl in table))

    def _check_forced(self, op: OpSpec, wanted: str, preferred: str | None, verdicts: dict[str, str]) -> None:
        if wanted not in verdicts:
            raise KernelConfigError(f"SGLANG_KERNELS: op {op.name} has no {wanted!r}. {_nearest(wanted, verdicts)}")
        if verdicts[wanted] != "ok":
            usable = ", ".join(name for name, verdict in verdicts.items() if verdict == "ok")
            raise KernelConfigError(
                f"SGLANG_KERNELS forces {op.name}={wanted}, which cannot run: {verdicts[wanted]}. Take that entry out, "
                f"or force one of: {usable}."
            )
        if preferred in verdicts and preferred != wanted:
            raise KernelConfigError(
                f"SGLANG_KERNELS forces {op.name}={wanted}, but the backend flag prefers {preferred}. Drop one of them."
            )

    def _verdict(self, impl: Impl) -> str:
        """ "ok", or why this implementation cannot run in this process."""
        if impl.kinds is not None and current_platform.kind not in impl.kinds:
            return f"not for {current_platform.kind} (only {', '.join(sorted(impl.kinds))})"
        if impl.archs is not None and not current_platform.arch.startswith(impl.archs):
            return f"not for {current_platform.arch} (only {', '.join(impl.archs)})"
        if impl.needs_device and current_platform.device_type == "cpu":
            return "needs a GPU"
        if impl.enabled is not None and not impl.enabled():
            return "switched off"
        if impl.package is None:
            return "ok"
        root = impl.package.partition(".")[0]
        reason = self._probe(root, impl)
        if reason is None and impl.min_version and is_older(version := version_of(root), impl.min_version):
            needed = ".".join(map(str, impl.min_version))
            return f"package {root} is {version or 'of unknown version'}, this needs {needed}"
        reason = reason or self._probe(impl.package, impl)
        return reason or "ok"

    def _probe(self, package: str, impl: Impl) -> str | None:
        """None when ``package`` imports, else why not; it is tried once, and logged once if it was requested."""
        if package not in self._packages:
            reason = probe_package(package)
            self._packages[package] = None if reason is None else f"package {package} does not import ({reason})"
            if impl.enabled is not None and reason is not None:
                logger.warning("%s is switched on, but does not import: its kernels do not run", package)
        return self._packages[package]

    def _refused(self, op: OpSpec, impl: Impl, record: OpRecord) -> None:
        record.calls_refused[impl.name] += 1
        if record.calls_refused[impl.name] == 1:
            logger.info("op %s: %s does not accept these arguments; the next implementation runs", op.name, impl.name)

    def _disable(self, op: OpSpec, impl: Impl, record: OpRecord, error: Exception) -> None:
        record.disabled[impl.name] = f"{type(error).__name__}: {error}"
        logger.warning("op %s: %s failed in warm-up and is disabled: %s", op.name, impl.name, error)
        left = [other.name for other in op.table or () if other.name not in record.disabled]
        record.chosen = left[0] if left else "none"


def parse_forcing(text: str) -> dict[str, str]:
    """Pairs "op=impl,op=impl" as a mapping. Raises KernelConfigError for a malformed or contradicting entry."""
    forced: dict[str, str] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        op, separator, impl = entry.partition("=")
        if not separator or not op.strip() or not impl.strip():
            raise KernelConfigError(f"SGLANG_KERNELS takes op=implementation pairs with commas between, got {entry!r}.")
        name = FORMER_NAMES.get(op.strip(), op.strip())
        if forced.setdefault(name, impl.strip()) != impl.strip():
            raise KernelConfigError(f"SGLANG_KERNELS names op {name!r} twice: {forced[name]}, then {impl.strip()}.")
    return forced


def _nearest(name: str, known: Any) -> str:
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(sorted(known))}."


REGISTRY = KernelRegistry()

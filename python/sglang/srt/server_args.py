"""The server's settings: one frozen dataclass whose annotated fields are the flags, and the process's copy of it.

``arg_groups.parse`` reads a command line, and ``arg_groups.plan.plan_launch`` decides what a launch with it comes to.
Importing this module loads no torch, and constructing ServerArgs touches no disk.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from sglang.srt.arg_groups.fields import LISTS, FieldSpec, field_specs
from sglang.srt.arg_groups.http import ADMISSION, API, HTTP, LOGGING, HttpArgs
from sglang.srt.arg_groups.kernels import GRAPHS, KERNELS, LINEAR, KernelArgs
from sglang.srt.arg_groups.memory import MEMORY, MemoryArgs
from sglang.srt.arg_groups.model import DTYPE, MODEL, ModelArgs
from sglang.srt.arg_groups.parallel import EXPERTS, PARALLEL, ParallelArgs
from sglang.srt.arg_groups.runtime import RUNTIME, RuntimeArgs
from sglang.srt.arg_groups.speculative import SPECULATIVE, SpecArgs
from sglang.srt.arg_groups.upstream import MISNAMED, distinct_flags, upstream_flags, verdicts

__all__ = [
    "ServerArgs",
    "ServerArgsError",
    "exit_with_errors",
    "get_global_server_args",
    "override_server_args",
    "set_global_server_args_for_scheduler",
    "specs",
]

logger = logging.getLogger(__name__)

DESCRIPTION = "Serve a Mixture-of-Experts model over HTTP. Flags have upstream sglang's names; see also --dry-run."
# The order of groups in --help and in the documentation.
GROUPS = (
    MODEL,
    HTTP,
    ADMISSION,
    DTYPE,
    MEMORY,
    RUNTIME,
    LOGGING,
    API,
    PARALLEL,
    KERNELS,
    EXPERTS,
    SPECULATIVE,
    LINEAR,
    GRAPHS,
)


_DEST = "_upstream_flags"


@dataclass
class FlagValues:
    """What a command line said: typed ``values`` by field name, and the problems and remarks met on the way."""

    values: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class ServerArgsError(ValueError):
    """Settings that cannot be used; ``errors`` holds each reason."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


@dataclass(frozen=True)
class ServerArgs(SpecArgs, KernelArgs, ParallelArgs, RuntimeArgs, HttpArgs, MemoryArgs, ModelArgs):
    """All settings of a server. None means that ``resolve`` chooses; what stays None afterwards is optional."""

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> ServerArgs:
        """From keywords of upstream's Engine; those that it alone has are as their flags. Raises ServerArgsError."""
        known = {spec.name for spec in specs()}
        found = FlagValues({name: value for name, value in kwargs.items() if name in known})
        given = []
        for name, value in kwargs.items():
            if name in known or value is None or value is False:
                continue
            flag = upstream_flags().get("--" + name.replace("_", "-"))
            if flag is None:
                found.errors.append(unknown_setting(name))
            else:
                given.append((flag.names[0], [] if value is True else [str(value)]))
        refused, found.warnings = verdicts(given)
        found.errors += refused
        return cls._of(found)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Declare every flag on another program's parser; read the result with ``from_cli_args``."""
        add_arguments(parser)

    @classmethod
    def from_cli_args(cls, namespace: argparse.Namespace) -> ServerArgs:
        """From a namespace of a parser that ``add_cli_args`` filled; raises ServerArgsError for what a flag refuses."""
        args = cls._of(collect_values(namespace))
        if problems := [problem for spec in specs() for problem in spec.problems(getattr(args, spec.name))]:
            raise ServerArgsError(problems)
        return args

    @classmethod
    def _of(cls, found: FlagValues) -> ServerArgs:
        if found.errors:
            raise ServerArgsError(found.errors)
        for warning in found.warnings:
            logger.warning("%s", warning)
        return cls(**found.values)


@functools.cache
def specs() -> tuple[FieldSpec, ...]:
    """The flags, by group, and within a group in order of declaration."""
    return tuple(sorted(field_specs(ServerArgs), key=lambda spec: GROUPS.index(spec.arg.group)))


class _Upstream(argparse.Action):
    """Remembers a flag of upstream that this engine lacks, with its values."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        words = values if isinstance(values, list) else [] if values is None else [values]
        seen = list(getattr(namespace, _DEST, ()))
        setattr(namespace, _DEST, [*seen, (option_string, words)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare every flag on ``parser``. Values stay text, and flags that are not given leave no attribute."""
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(spec.arg.group for spec in specs())}
    for spec in specs():
        group = groups[spec.arg.group]
        options: dict[str, Any] = {"dest": spec.name, "default": argparse.SUPPRESS, "help": _help(spec)}
        if spec.kind == "bool":
            group.add_argument(*spec.flags, action="store_true", **options)
            continue
        options["metavar"] = spec.arg.metavar or (spec.kind.rstrip("s").upper() if not spec.choices else "NAME")
        group.add_argument(*spec.flags, nargs="+" if spec.kind in LISTS else None, **options)
    for flag in distinct_flags():
        nargs = None if flag.nargs == 1 else flag.nargs
        hidden: dict[str, Any] = {"dest": _DEST, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        parser.add_argument(*flag.names, action=_Upstream, nargs=nargs, **hidden)


def _help(spec: FieldSpec) -> str:
    parts = [spec.arg.help]
    if spec.choices:
        parts.append(f"One of {', '.join(spec.choices)}.")
    elif spec.kind != "bool" and spec.bounds():
        parts.append(f"Must be {spec.bounds()}.")
    if spec.default in (None, "") and spec.arg.auto:
        parts.append(f"Default: {spec.arg.auto}.")
    elif spec.kind != "bool" and spec.default not in (None, ""):
        parts.append(f"Default: {spec.default}.")
    return " ".join(parts).replace("%", "%%")


def collect_values(namespace: argparse.Namespace) -> FlagValues:
    """The typed values of a namespace that ``add_arguments`` shaped, and what the flags that only upstream has get."""
    parsed = FlagValues()
    for spec in specs():
        if not hasattr(namespace, spec.name):
            continue
        raw = getattr(namespace, spec.name)
        if spec.kind == "bool":
            parsed.values[spec.name] = raw
            continue
        try:
            parsed.values[spec.name] = spec.parse(raw if isinstance(raw, list) else [raw])
        except ValueError as error:
            parsed.errors.append(str(error))
    errors, warnings = verdicts(getattr(namespace, _DEST, ()))
    parsed.errors += errors
    parsed.warnings += warnings
    return parsed


def unknown_setting(name: str) -> str:
    """What to say of a keyword that is no setting, as ``parse.unknown_flag`` says of a flag."""
    meant = MISNAMED.get("--" + name.replace("_", "-"), "")
    if meant and not meant.startswith("-"):
        return f"unknown setting {name}: {meant}"
    flag = meant.partition(" ")[0]
    near = [spec.name for spec in specs() if flag in spec.flags] or difflib.get_close_matches(
        name, [spec.name for spec in specs()], n=1, cutoff=0.8
    )
    return f"unknown setting {name}" + (f": did you mean {near[0]}?" if near else "")


def exit_with_errors(errors: Sequence[str]) -> None:
    """Print every problem to stderr and exit with status 2."""
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


_global_server_args: ServerArgs | None = None


def get_global_server_args() -> ServerArgs:
    """The resolved arguments of this process; raises RuntimeError before they are set."""
    if _global_server_args is None:
        raise RuntimeError("server arguments are not set in this process: set_global_server_args_for_scheduler first")
    return _global_server_args


def set_global_server_args_for_scheduler(args: ServerArgs) -> None:
    """Make ``args`` what ``get_global_server_args`` returns in this process."""
    global _global_server_args
    _global_server_args = args


@contextmanager
def override_server_args(**changes: Any) -> Iterator[ServerArgs]:
    """Within the block, the process's arguments (or the defaults) with ``changes``; for tests."""
    global _global_server_args
    previous = _global_server_args
    _global_server_args = replace(previous or ServerArgs(), **changes)
    try:
        yield _global_server_args
    finally:
        _global_server_args = previous

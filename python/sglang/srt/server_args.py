"""The server's settings: one frozen dataclass whose annotated fields are the flags, and the process's copy of it.

``arg_groups.parse`` reads a command line, and ``arg_groups.plan.plan_launch`` decides what a launch with it comes to.
Importing this module loads no torch, and constructing ServerArgs touches no disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from sglang.srt.arg_groups.command_line import FlagValues, add_arguments, collect_values, unknown_setting
from sglang.srt.arg_groups.fields import FieldSpec, field_specs
from sglang.srt.arg_groups.http import ADMISSION, API, HTTP, LOGGING, HttpArgs
from sglang.srt.arg_groups.kernels import GRAPHS, KERNELS, LINEAR, KernelArgs
from sglang.srt.arg_groups.memory import MEMORY, MemoryArgs
from sglang.srt.arg_groups.model import DTYPE, MODEL, ModelArgs
from sglang.srt.arg_groups.parallel import EXPERTS, PARALLEL, ParallelArgs
from sglang.srt.arg_groups.runtime import RUNTIME, RuntimeArgs
from sglang.srt.arg_groups.speculative import SPECULATIVE, SpecArgs
from sglang.srt.arg_groups.upstream import upstream_flags, verdicts

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
        """Construct from keywords as upstream's Engine takes them.

        A keyword of upstream that this engine lacks is treated as its flag would be. Raises ServerArgsError.
        """
        known = {spec.name for spec in specs()}
        found = FlagValues({name: value for name, value in kwargs.items() if name in known})
        given = []
        for name, value in kwargs.items():
            if name in known or value is None or value is False:
                continue
            flag = upstream_flags().get("--" + name.replace("_", "-"))
            if flag is None:
                found.errors.append(unknown_setting(name, specs()))
            else:
                given.append((flag.names[0], [] if value is True else [str(value)]))
        refused, found.warnings = verdicts(given)
        found.errors += refused
        return cls._of(found)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Declare every flag on another program's parser; read the result with ``from_cli_args``."""
        add_arguments(parser, specs())

    @classmethod
    def from_cli_args(cls, namespace: argparse.Namespace) -> ServerArgs:
        """From a namespace of a parser that ``add_cli_args`` filled; raises ServerArgsError for what a flag refuses."""
        args = cls._of(collect_values(namespace, specs()))
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

    def to_json(self) -> str:
        """All fields as JSON text, for a child process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServerArgs:
        """The ServerArgs whose ``to_json`` gave ``text``."""
        return cls(**json.loads(text))


@functools.cache
def specs() -> tuple[FieldSpec, ...]:
    """The flags, by group, and within a group in order of declaration."""
    return tuple(sorted(field_specs(ServerArgs), key=lambda spec: GROUPS.index(spec.arg.group)))


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

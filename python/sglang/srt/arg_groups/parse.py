"""The door for a command line: ``parse`` makes settings of it, ``read`` also what is wrong with it. Loads no torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from sglang.srt.arg_groups.checks import check
from sglang.srt.arg_groups.command_line import parse_command_line
from sglang.srt.environ import check_environment
from sglang.srt.server_args import DESCRIPTION, ServerArgs, ServerArgsError, specs
from sglang.srt.utils.network import PortError, bind

logger = logging.getLogger(__name__)


@dataclass
class Parsed:
    """What was asked for: ``args`` with unusable values back at their defaults, and what is wrong or worth saying."""

    args: ServerArgs
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def start_errors(self) -> list[str]:
        """What is wrong with flags and variables, or else with the port.

        A dry run has none: it lists them with everything else.
        """
        if self.args.dry_run:
            return []
        if errors := [*self.errors, *check_environment().errors]:
            return errors
        try:
            bind(self.args.host, self.args.port).close()
        except PortError as error:
            return [str(error)]
        return []


def read(argv: Sequence[str]) -> Parsed:
    """Read a command line (without the program's name) and the --config file that it names, errors collected.

    ``--help`` and ``--version`` print and exit. What depends on the model or the machine is left to ``plan_launch``.
    """
    found = parse_command_line(argv, specs(), DESCRIPTION)
    problems, args = check(ServerArgs(**found.values))
    return Parsed(args, [*found.errors, *problems], found.warnings)


def parse(argv: Sequence[str]) -> ServerArgs:
    """The settings of a command line, read as ``read`` does; raises ServerArgsError with every problem."""
    parsed = read(argv)
    for warning in parsed.warnings:
        logger.warning("%s", warning)
    if parsed.errors:
        raise ServerArgsError(parsed.errors)
    return parsed.args

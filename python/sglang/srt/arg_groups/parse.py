"""Entry point for a command line: ``parse`` returns settings, ``read`` also the problems. Loads no torch."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.checks import RULES
from sglang.srt.arg_groups.upstream import MISNAMED, distinct_flags, upstream_flags
from sglang.srt.configs.model_folder import folder_problems
from sglang.srt.environ import check_environment
from sglang.srt.server_args import (
    DESCRIPTION,
    FlagValues,
    ServerArgs,
    ServerArgsError,
    add_arguments,
    collect_values,
    specs,
)
from sglang.srt.utils.network import PortError, bind
from sglang.version import version_line

logger = logging.getLogger(__name__)


@dataclass
class Parsed:
    """The requested settings: ``args`` with unusable values reset to their defaults, with errors and warnings."""

    args: ServerArgs
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def start_errors(self) -> list[str]:
        """What is wrong with flags and variables, or else with the model's folder and the port.

        A dry run lists these with all else.
        """
        if self.args.dry_run:
            return []
        if errors := [*self.errors, *check_environment().errors]:
            return errors
        if errors := folder_problems(self.args.model_path, self.args.revision):
            return [f"model: {error}" for error in errors]
        try:
            bind(self.args.host, self.args.port).close()
        except PortError as error:
            return [str(error)]
        return []


def read(argv: Sequence[str]) -> Parsed:
    """Read a command line (without the program's name) and the --config file that it names, errors collected.

    ``--help`` and ``--version`` print and exit. What depends on the model or the machine is left to ``plan_launch``.
    """
    parser, names = build_parser(), _flag_names()
    namespace, errors = _read_words(parser, names, argv)
    found = FlagValues()
    config_file = getattr(namespace, "config", None)
    if config_file is not None:
        words, file_errors = _config_words(config_file)
        file_namespace, more = _read_words(parser, names, words)
        from_file = collect_values(file_namespace)
        found.values.update(from_file.values)
        found.errors += [f"{config_file}: {error}" for error in [*file_errors, *more, *from_file.errors]]
        found.warnings += [f"{config_file}: {warning}" for warning in from_file.warnings]
    from_line = collect_values(namespace)
    problems, args = check(ServerArgs(**found.values | from_line.values))
    return Parsed(args, [*found.errors, *errors, *from_line.errors, *problems], [*found.warnings, *from_line.warnings])


def check(args: ServerArgs) -> tuple[list[str], ServerArgs]:
    """(problems that need neither model nor machine, ``args`` with unusable values reset to their defaults)."""
    problems = []
    defaults = {}
    for spec in specs():
        found = spec.problems(getattr(args, spec.name))
        problems += found
        if found:
            defaults[spec.name] = spec.default
    usable = replace(args, **defaults)
    problems += [problem for rule in RULES for problem in rule(usable)]
    return problems, usable


def parse(argv: Sequence[str]) -> ServerArgs:
    """The settings of a command line, read as ``read`` does; raises ServerArgsError with every problem."""
    parsed = read(argv)
    for warning in parsed.warnings:
        logger.warning("%s", warning)
    if parsed.errors:
        raise ServerArgsError(parsed.errors)
    return parsed.args


class _ParseFailure(Exception):
    """argparse would have printed its usage and exited."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise _ParseFailure(message)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parser.exit(message=f"{version_line()}\n")


def build_parser() -> argparse.ArgumentParser:
    """The stand-alone parser of the server, with --config and --version."""
    parser = _Parser(
        prog="sglang.launch_server", description=DESCRIPTION, argument_default=argparse.SUPPRESS, exit_on_error=False
    )
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of flags; the command line wins over it."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    add_arguments(parser)
    return parser


def _flag_names() -> dict[str, tuple[str, ...]]:
    """Every option string, with all names of its flag."""
    flags = [("-h", "--help"), ("--config",), ("--version",), *(spec.flags for spec in specs())]
    flags += [flag.names for flag in distinct_flags()]
    return {name: names for names in flags for name in names}


def _read_words(
    parser: argparse.ArgumentParser, names: dict[str, tuple[str, ...]], argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """(namespace, problems): what argparse cannot parse is reported and left out, and the rest is parsed."""
    words, errors = _expand(names, argv)
    while True:
        try:
            namespace, rest = parser.parse_known_args(words)
            break
        except argparse.ArgumentError as error:
            option = (error.argument_name or "").split("/")[0]
            errors.append(f"{option}: {error.message}")
            words = _without(words, names[option])
        except _ParseFailure as failure:
            return argparse.Namespace(), [*errors, str(failure)]
    errors += [f"unexpected argument {word!r}: every setting is a flag, such as --model-path {word}" for word in rest]
    return namespace, errors


def _expand(names: dict[str, tuple[str, ...]], words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(words with abbreviations expanded, problems): unknown and ambiguous flags are removed, with their values."""
    result: list[str] = []
    errors: list[str] = []
    dropping = False
    for word in words:
        if not word.startswith("-") or _is_number(word):
            if not dropping:
                result.append(word)
            continue
        name, equals, value = word.partition("=")
        exact = name in names or name in MISNAMED or name[:2] != "--"
        matches = [flag for flag in names if (flag == name if exact else flag.startswith(name))]
        dropping = len({names[flag] for flag in matches}) != 1
        if not dropping:
            result.append(matches[0] + equals + value)
        elif matches:
            ours = [flag for flag in matches if flag not in upstream_flags()] or matches
            some = ", ".join(sorted(ours)[:6]) + (", ..." if len(ours) > 6 else "")
            errors.append(f"{name} is ambiguous: it could be {some}")
        else:
            errors.append(unknown_flag(name, names))
    return result, errors


def unknown_flag(name: str, known: Iterable[str]) -> str:
    """The error for an unknown flag: names the nearest flag, or gives the answer for the nearest unsupported one."""
    asked = name.replace("_", "-")
    if meant := MISNAMED.get(asked):
        return f"unknown flag {name}: " + (f"did you mean {meant}?" if meant.startswith("-") else meant)
    unsupported = upstream_flags()
    for near in difflib.get_close_matches(asked, known, n=5, cutoff=0.8):
        if near not in unsupported:
            return f"unknown flag {name}: did you mean {near}?"
        if difflib.SequenceMatcher(None, asked, near).ratio() > 0.9:
            return f"unknown flag {name}: {near} {'is refused' if unsupported[near].refused else 'has no effect'}: " + (
                unsupported[near].reason
            )
    return f"unknown flag {name}: --help lists all flags"


def _without(words: list[str], names: Sequence[str]) -> list[str]:
    """``words`` without the flag of these names and without the values after it."""
    result: list[str] = []
    dropping = False
    for word in words:
        if word.startswith("-") and not _is_number(word):
            dropping = word.partition("=")[0] in names
        if not dropping:
            result.append(word)
    return result


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _config_words(path: str) -> tuple[list[str], list[str]]:
    """(command line, problems) of a --config file: keys are long flag names, true sets a flag, false leaves it."""
    import yaml

    try:
        document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        return [], [f"cannot be read: {error.strerror}"]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return [], [f"not valid YAML: {' '.join(str(error).split())}"]
    if document is None:
        return [], []
    if not isinstance(document, dict):
        return [], ["must map long flag names to values, such as `tp-size: 2`"]
    words: list[str] = []
    errors: list[str] = []
    for key, value in document.items():
        if key == "config":
            errors.append("key config: a config file cannot name another")
        elif value is True:
            words.append(f"--{key}")
        elif value is None:
            errors.append(f"key {key} has no value")
        elif value is not False:
            items = value if isinstance(value, list) else [value]
            text = [json.dumps(item) if isinstance(item, dict) else str(item) for item in items]
            words += [f"--{key}={text[0]}"] if len(text) == 1 else [f"--{key}", *text]
    return words, errors

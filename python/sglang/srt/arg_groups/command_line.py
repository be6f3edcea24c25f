"""Command line and --config file to field values: names, abbreviations, unknown flags, every problem in one list."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.fields import LISTS, FieldSpec
from sglang.srt.arg_groups.upstream import MISNAMED, distinct_flags, upstream_flags, verdicts
from sglang.version import version_line

_DEST = "_upstream_flags"


@dataclass
class FlagValues:
    """What a command line said: typed ``values`` by field name, and the problems and remarks met on the way."""

    values: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class _ParseFailure(Exception):
    """argparse would have printed its usage and exited."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise _ParseFailure(message)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parser.exit(message=f"{version_line()}\n")


class _Upstream(argparse.Action):
    """Remembers a flag of upstream that this engine lacks, with its values."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        words = values if isinstance(values, list) else [] if values is None else [values]
        seen = list(getattr(namespace, _DEST, ()))
        setattr(namespace, _DEST, [*seen, (option_string, words)])


def add_arguments(parser: argparse.ArgumentParser, specs: Sequence[FieldSpec]) -> None:
    """Declare every flag on ``parser``. Values stay text, and flags that are not given leave no attribute."""
    groups = {name: parser.add_argument_group(name) for name in dict.fromkeys(spec.arg.group for spec in specs)}
    for spec in specs:
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


def build_parser(specs: Sequence[FieldSpec], description: str) -> argparse.ArgumentParser:
    """The stand-alone parser of the server, with --config and --version."""
    parser = _Parser(
        prog="sglang.launch_server", description=description, argument_default=argparse.SUPPRESS, exit_on_error=False
    )
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of flags; the command line wins over it."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    add_arguments(parser, specs)
    return parser


def parse_command_line(argv: Sequence[str], specs: Sequence[FieldSpec], description: str) -> FlagValues:
    """Read ``argv`` and the file it names with --config; never raises or exits, except for --help and --version."""
    parser = build_parser(specs, description)
    names = _flag_names(specs)
    namespace, errors = _read_words(parser, names, argv)
    parsed = FlagValues()
    config_file = getattr(namespace, "config", None)
    if config_file is not None:
        words, file_errors = _config_words(config_file)
        file_namespace, more = _read_words(parser, names, words)
        from_file = collect_values(file_namespace, specs)
        parsed.values.update(from_file.values)
        parsed.errors += [f"{config_file}: {error}" for error in [*file_errors, *more, *from_file.errors]]
        parsed.warnings += [f"{config_file}: {warning}" for warning in from_file.warnings]
    from_line = collect_values(namespace, specs)
    parsed.values.update(from_line.values)
    parsed.errors += [*errors, *from_line.errors]
    parsed.warnings += from_line.warnings
    return parsed


def collect_values(namespace: argparse.Namespace, specs: Sequence[FieldSpec]) -> FlagValues:
    """The typed values of a namespace that ``add_arguments`` shaped, and what the flags that only upstream has get."""
    parsed = FlagValues()
    for spec in specs:
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


def _flag_names(specs: Sequence[FieldSpec]) -> dict[str, tuple[str, ...]]:
    """Every option string, with all names of its flag."""
    flags = [("-h", "--help"), ("--config",), ("--version",), *(spec.flags for spec in specs)]
    flags += [flag.names for flag in distinct_flags()]
    return {name: names for names in flags for name in names}


def _read_words(
    parser: argparse.ArgumentParser, names: dict[str, tuple[str, ...]], argv: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """(namespace, problems): what argparse cannot take is reported and left out, and the rest is read."""
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
    """(words with abbreviations written out, problems): unknown and ambiguous flags go, with the words after them."""
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
    """What to say of a flag that nobody knows: the one that is meant, or of a misspelt lacking one what it gets."""
    asked = name.replace("_", "-")
    if meant := MISNAMED.get(asked):
        return f"unknown flag {name}: " + (f"did you mean {meant}?" if meant.startswith("-") else meant)
    lacking = upstream_flags()
    for near in difflib.get_close_matches(asked, known, n=5, cutoff=0.8):
        if near not in lacking:
            return f"unknown flag {name}: did you mean {near}?"
        if difflib.SequenceMatcher(None, asked, near).ratio() > 0.9:
            return f"unknown flag {name}: {near} {'is refused' if lacking[near].refused else 'has no effect'}: " + (
                lacking[near].reason
            )
    return f"unknown flag {name}: --help lists all flags"


def unknown_setting(name: str, specs: Sequence[FieldSpec]) -> str:
    """What to say of a keyword that is no setting, as ``unknown_flag`` does of a flag."""
    meant = MISNAMED.get("--" + name.replace("_", "-"), "")
    if meant and not meant.startswith("-"):
        return f"unknown setting {name}: {meant}"
    flag = meant.partition(" ")[0]
    near = [spec.name for spec in specs if flag in spec.flags] or difflib.get_close_matches(
        name, [spec.name for spec in specs], n=1, cutoff=0.8
    )
    return f"unknown setting {name}" + (f": did you mean {near[0]}?" if near else "")


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

"""Small helpers, many under upstream's names: platform questions, environment readers, ports, JSON files."""

from __future__ import annotations

import json
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from sglang.srt.environ import EnvBool, EnvError, EnvField, EnvInt, declared_variables
from sglang.srt.utils.limits import MAX_CHECKPOINT_JSON_BYTES, MAX_CHECKPOINT_JSON_DEPTH


def is_hip() -> bool:
    """True under the ROCm policy, on a GPU or over the fakes. Product code asks `current_platform` instead."""
    from sglang.srt.platforms import current_platform

    return bool(current_platform.kind == "hip")


def get_bool_env_var(name: str, default: str = "false") -> bool:
    """A variable as a boolean, `default` if unset; raises EnvError if it is not one or a SGLANG_ name is undeclared."""
    field = _field(name, EnvBool(False, doc="A variable of other software."))
    value = field.get() if field.is_set() else field.parse(default)
    return bool(value)


def get_int_env_var(name: str, default: int = 0) -> int:
    """A variable as a whole number, `default` if unset; raises EnvError as `get_bool_env_var` does."""
    field = _field(name, EnvInt(default, doc="A variable of other software."))
    return int(field.get()) if field.is_set() else default


def _field(name: str, foreign: EnvField[Any]) -> EnvField[Any]:
    """The declared field of a SGLANG_ name, or `foreign` under the name of someone else's variable."""
    if not name.startswith(("SGLANG_", "SGL_")):
        foreign.name = name
        return foreign
    field = declared_variables().get(name)
    if field is None:
        raise EnvError(f"{name} is not declared in sglang/srt/environ.py; declare it there, then read envs.{name}")
    if not isinstance(field, type(foreign)):
        raise EnvError(f"{name} is declared as {field.kind}, but is read as {foreign.kind}; read envs.{name}.get()")
    return field


def read_text(path: Path, refusal: type[ValueError]) -> str:
    """The text of a checkpoint's file; raises ``refusal`` with the file's name where it is too large or not UTF-8."""
    try:
        size = path.stat().st_size
        if size > MAX_CHECKPOINT_JSON_BYTES:
            raise refusal(f"{path} has {size} bytes; at most {MAX_CHECKPOINT_JSON_BYTES} are read.")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise refusal(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise refusal(f"{path} is not valid UTF-8: {error.reason} at byte {error.start}") from None


def end_process(status: int) -> NoReturn:
    """End at once with what was logged and printed: the interpreter's own end takes a second of work, and frees only
    what the system frees anyway. What must be closed in order is closed before."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def read_json_object(path: Path, refusal: type[ValueError]) -> dict[str, Any]:
    """What the file holds; raises ``refusal`` with the file's name when that is no JSON object within the limits."""
    text = read_text(path, refusal)
    try:
        value = json.loads(text)
    except RecursionError:
        raise refusal(f"{path} nests deeper than {MAX_CHECKPOINT_JSON_DEPTH} levels.") from None
    except ValueError as error:
        raise refusal(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise refusal(f"{path} must hold a JSON object, got {type(value).__name__}.")
    level: list[Any] = [value]
    for _ in range(MAX_CHECKPOINT_JSON_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
    if level:
        raise refusal(f"{path} nests deeper than {MAX_CHECKPOINT_JSON_DEPTH} levels.")
    return value


def get_free_port() -> int:
    """A TCP port that was free a moment ago; another process may take it before the caller does."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("", 0))
        return int(sock.getsockname()[1])

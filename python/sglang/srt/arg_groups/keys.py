"""API keys from places that ``ps`` does not show: a file, or an environment variable."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.environ import EnvStr, envs
from sglang.srt.server_args import ServerArgs

_MAX_KEY_BYTES = 4096


class KeyFileError(ValueError):
    """The file contains no key."""


@dataclass
class Keys:
    """The keys that are not given by flag, by field, with errors and warnings about their sources."""

    values: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_keys(args: ServerArgs, environ: Mapping[str, str] | None = None) -> Keys:
    """Each key from its flag, its file or its variable, in this order; a flag and a file together are an error."""
    environ = os.environ if environ is None else environ
    keys = Keys()
    sources: tuple[tuple[str, EnvStr], ...] = (
        ("api_key", envs.SGLANG_API_KEY),
        ("admin_api_key", envs.SGLANG_ADMIN_API_KEY),
    )
    for name, variable in sources:
        flag, path = "--" + name.replace("_", "-"), getattr(args, f"{name}_file")
        if getattr(args, name) is not None:
            if path is not None:
                keys.errors.append(f"{flag} and {flag}-file both give a key: remove one")
            continue
        key = variable.read(environ) or None
        if path is not None:
            try:
                key = _read_key_file(path)
            except (OSError, KeyFileError) as error:
                why = error.strerror if isinstance(error, OSError) else error
                keys.errors.append(f"{flag}-file {path}: {why}")
                continue
            if stat.S_IMODE(os.stat(path).st_mode) & 0o077:
                keys.warnings.append(f"{flag}-file {path} can be read by other users: chmod 600 {path}")
        keys.values[name] = key
    return keys


def _read_key_file(path: str) -> str:
    with open(path, "rb") as file:
        data = file.read(_MAX_KEY_BYTES + 1)
    if len(data) > _MAX_KEY_BYTES:
        raise KeyFileError(f"longer than {_MAX_KEY_BYTES} bytes, so it is not a key")
    try:
        key = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise KeyFileError("not UTF-8 text") from None
    if not key:
        raise KeyFileError("empty: write the key into it, or remove the flag to use no key")
    if not key.isprintable():
        raise KeyFileError("contains more than one line, or control characters")
    return key

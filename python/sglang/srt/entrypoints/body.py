"""From the bytes of a request body to its struct and the fields that the struct does not have."""

from __future__ import annotations

import functools
import re
import types
import typing
from typing import Any, TypeVar

import msgspec

from sglang.srt.entrypoints.errors import body_error
from sglang.srt.managers.request_fields import UnknownFields

T = TypeVar("T")
# As msgspec ends its messages.
_FIELD = re.compile(r"at `\$\.(\w+)|^Object missing required field `(\w+)`$")


def decode_body(data: bytes | bytearray, body_type: type[T], unknown_fields: UnknownFields) -> tuple[T, list[str]]:
    """The JSON body as ``body_type``, and warnings for its unknown fields if the body asks for them.

    ``body_type`` and the structs in it forbid unknown fields, so that a body without any is decoded once. Whole floats
    count as integers. Raises RequestError for a body that does not fit, and for a field that is refused.
    """
    try:
        try:
            return msgspec.json.decode(data, type=body_type, strict=False), []
        except msgspec.ValidationError as error:
            if "unknown field" not in str(error):
                raise
        raw = msgspec.json.decode(data)
        warnings: list[str] | None = [] if isinstance(raw, dict) and raw.get("return_warnings") is True else None
        known = _take_known(raw, body_type, "", unknown_fields, warnings)
        return msgspec.convert(known, body_type, strict=False), warnings or []
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        at = _FIELD.search(str(error))
        raise body_error(f"The body is not valid: {error}", at and (at[1] or at[2])) from None


def _take_known(raw: Any, struct: Any, where: str, unknown_fields: UnknownFields, warnings: list[str] | None) -> Any:
    """``raw`` without the fields that ``struct``, or a struct in it, does not have; those are checked."""
    if not isinstance(raw, dict):
        return raw
    names = struct.__struct_fields__
    unknown_fields.judge({name: value for name, value in raw.items() if name not in names}, names, where, warnings)
    known = {name: value for name, value in raw.items() if name in names}
    for name, inner in _inner_structs(struct).items():
        if name in known:
            known[name] = _take_known(known[name], inner, f"{where}{name}.", unknown_fields, warnings)
    return known


@functools.cache
def _inner_structs(struct: type[Any]) -> dict[str, type[Any]]:
    """Fields of ``struct`` that are a struct or null."""
    found = {}
    for name, hint in typing.get_type_hints(struct).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for option in options:
            if isinstance(option, type) and issubclass(option, msgspec.Struct):
                found[name] = option
    return found

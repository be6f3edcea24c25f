"""The output constraint of a body, in the fields of OpenAI, upstream or vLLM, as a sampling parameter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.entrypoints.openai.protocol import GenerationRequest
from sglang.srt.managers.request_input import RequestError

_JSON_OBJECT = {"type": "object"}


def output_form(body: GenerationRequest) -> dict[str, Any]:
    """The sampling parameter that constrains the output, if there is one. Raises RequestError."""
    given = [(name, value) for name in READERS if (value := getattr(body, name)) is not None]
    found = [(name, form) for name, value in given if (form := READERS[name](name, value))]
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise RequestError(f"{names} exclude each other: output has one constraint.", param=found[1][0])
    return found[0][1] if found else {}


def answer_schema(schema: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """A schema, which may be JSON text, with llguidance's ``options`` where it sets none. Raises RequestError."""
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"The JSON schema is not valid JSON: {error}.", param="json_schema") from None
    schema = {} if schema is True else schema
    if not isinstance(schema, Mapping):
        raise RequestError("The JSON schema must be an object.", param="json_schema")
    return {"x-guidance": options, **schema}


def _response_format(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    kind = value.get("type", "text")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": _JSON_OBJECT}
    if kind == "structural_tag":
        return {"structural_tag": dict(value)}
    if kind != "json_schema":
        raise RequestError(
            f"{name}.type must be 'text', 'json_object', 'json_schema' or 'structural_tag', got {kind!r:.100}.",
            param=name,
        )
    wrapped = value.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, Mapping) else None
    if not isinstance(schema, Mapping | bool):
        raise RequestError(f"{name}.json_schema.schema must be a JSON schema, an object.", param=name)
    return {"json_schema": schema}


def _same(kind: str) -> Callable[[str, Any], dict[str, Any]]:
    return lambda _, value: {kind: value}


def _choice(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise RequestError(f"{name} must be a list of non-empty strings.", param=name)
    # A terminal, which may have any number of alternatives; a rule has one state for each.
    return {"ebnf": "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in value)}


def _structured_outputs(name: str, value: Any) -> dict[str, Any]:
    given = {key: item for key, item in value.items() if item is not None and item is not False}
    unknown = sorted(given.keys() - _VLLM_READERS.keys())
    if unknown or len(given) > 1:
        allowed = ", ".join(sorted(_VLLM_READERS))
        raise RequestError(f"{name} holds one of {allowed}, got {', '.join(sorted(given))!r:.200}.", param=name)
    return next((_VLLM_READERS[key](f"{name}.{key}", item) for key, item in given.items()), {})


_VLLM_READERS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "json": _same("json_schema"),
    "regex": _same("regex"),
    "choice": _choice,
    "grammar": _same("ebnf"),
    "structural_tag": _same("structural_tag"),
    "json_object": lambda _, __: {"json_schema": _JSON_OBJECT},
}
# By field of the body.
READERS: dict[str, Callable[[str, Any], dict[str, Any]]] = {
    "response_format": _response_format,
    **{name: _same(name) for name in ("json_schema", "regex", "ebnf", "structural_tag")},
    **{f"guided_{name}": _VLLM_READERS[name] for name in ("json", "regex", "choice", "grammar")},
    "structured_outputs": _structured_outputs,
}

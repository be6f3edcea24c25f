"""The OpenAPI 3.1 document of the server, made from the endpoints and their msgspec types."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from sglang.srt.entrypoints.endpoint import Endpoint
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.version import __version__

_REF = "#/components/schemas/{name}"
_ABOUT = (
    "An engine for Mixture-of-Experts models with sglang's API. Fields that are not listed are ignored, and named in "
    "the server's log; return_warnings lists them in the answer. Fields of other servers that would change the answer "
    "are refused by name."
)


def openapi_document(endpoints: Sequence[Endpoint], needs_key: bool) -> dict[str, Any]:
    """The document; endpoints without a summary are left out."""
    shown = [endpoint for endpoint in endpoints if endpoint.summary]
    types = {kind for endpoint in shown for kind in (endpoint.body, endpoint.result, endpoint.chunk) if kind}
    ordered = sorted(types, key=str)
    schemas, components = msgspec.json.schema_components([*ordered, SamplingParams], ref_template=_REF)
    schema_of = dict(zip(ordered, schemas))
    _describe_sampling_params(components)
    for schema in components.values():
        # Docstrings as plain text.
        schema["description"] = re.sub(r"\s+", " ", schema.get("description", "")).replace("``", "`").strip()
    components["Error"] = _ERROR
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in shown:
        for path in endpoint.paths:
            item = paths.setdefault(re.sub(r"{(\w+):path}", r"{\1}", path), {})
            for method in endpoint.methods:
                item[method.lower()] = _operation(endpoint, path, method, schema_of)
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "sglang", "version": __version__, "description": _ABOUT},
        "paths": paths,
        "components": {"schemas": components},
    }
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return _with_readable_names(document)


def _operation(endpoint: Endpoint, path: str, method: str, schema_of: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.result is not None:
        content["application/json"] = {"schema": schema_of[endpoint.result]}
    if endpoint.chunk is not None:
        events = {"type": "string", "description": "Lines of `data: ` and an object; the last one is `data: [DONE]`."}
        content["text/event-stream"] = {"schema": events, "x-event-schema": schema_of[endpoint.chunk]}
    error = {
        "description": "Refused or failed",
        "content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}},
    }
    operation: dict[str, Any] = {
        "summary": endpoint.summary if path == endpoint.path else f"Same as {endpoint.path}.",
        "operationId": f"{method.lower()}{re.sub(r'[^a-z_]+', '_', path)}",
        "tags": [endpoint.tag],
        "responses": {"200": {"description": "Done", **({"content": content} if content else {})}, "default": error},
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"{(\w+)", path)
    ]
    parameters += [
        {"name": name, "in": "query", "description": about, "schema": {"type": "string"}}
        for name, about in endpoint.query
    ]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None and method != "GET":
        body = {"application/json": {"schema": schema_of[endpoint.body]}}
        operation["requestBody"] = {"required": True, "content": body}
    return operation


_FIELDS_OF_ERRORS: dict[str, Any] = {
    "message": {"type": "string"},
    "type": {"type": "string"},
    "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "code": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
}
_ERROR: dict[str, Any] = {
    "title": "Error",
    "description": "What went wrong, as flat keys and as OpenAI's nested object.",
    "type": "object",
    "properties": {
        "object": {"const": "error"},
        **_FIELDS_OF_ERRORS,
        "error": {"type": "object", "properties": _FIELDS_OF_ERRORS},
    },
    "required": ["object", "message", "error"],
}


def _describe_sampling_params(components: dict[str, Any]) -> None:
    """``sampling_params`` is decoded by hand: single values are lists of one, and null is the default."""
    for name, field in components["SamplingParams"]["properties"].items():
        options = [{key: value for key, value in field.items() if key != "default"}]
        options = field["anyOf"] if "anyOf" in field else options
        options = options + [options[0]["items"]] if name in ("stop", "stop_token_ids") else options
        null = [] if {"type": "null"} in options else [{"type": "null"}]
        components["SamplingParams"]["properties"][name] = {"anyOf": options + null, "default": field.get("default")}
    ref = {"$ref": _REF.format(name="SamplingParams")}
    request = components.get("GenerateReqInput")
    if request is not None:
        request["properties"]["sampling_params"] = {"anyOf": [ref, {"type": "array", "items": ref}, {"type": "null"}]}


def _with_readable_names(document: dict[str, Any]) -> dict[str, Any]:
    """``GenerationResponse_ChatChoice_``, msgspec's name of a generic type, as ``ChatChoiceResponse``."""
    text = msgspec.json.encode(document).decode()
    text = re.sub(r"GenerationResponse_(\w+?)_(?=\")", r"\1Response", text)
    text = re.sub(r"GenerationResponse\[(\w+)\]", r"\1Response", text)
    return msgspec.json.decode(text, type=dict[str, Any])

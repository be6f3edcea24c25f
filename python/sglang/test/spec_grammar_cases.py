"""Requests for output of given forms, next to some for none, as tests of speculation serve them."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema

from sglang.srt.constrained.llguidance_backend import grammar_of
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.engine_harness import EngineHarness, Finished
from sglang.test.tiny_tasks import heldout_questions

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["é€😀"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
WORD = "[a-z]{3,9}-[0-9]{2,4}"
FORMS: dict[str, tuple[str, str] | None] = {
    "word": ("regex", WORD),
    "json": ("json_schema", json.dumps(SCHEMA)),
    "short": ("regex", "ab"),
    "free": None,
}
DRAWN: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 1.2, "top_p": 0.95})


def serve_forms(engine: EngineHarness, tokenizer: Tokenizer) -> dict[str, Finished]:
    """Sixteen requests: each form and none, drawn in both ways, next to penalties in every fourth of them."""
    for number, question in enumerate(heldout_questions()[:16]):
        form = tuple(FORMS)[number % 4]
        kind = FORMS[form]
        edits: dict[str, Any] = {"presence_penalty": 0.7, "min_new_tokens": 4} if number // 4 == 3 else {}
        params = SamplingParams(
            max_new_tokens=40 if kind else 9, sampling_seed=number, **DRAWN[number // 4 % 2], **edits
        )
        grammar = None if kind is None else grammar_of(*kind, {"whitespace_flexible": False})
        engine.submit(f"{form} {number}", tokenizer.encode(question.text), params, grammar=grammar)
    return engine.run()


def has_form(rid: str, text: str) -> bool:
    """Whether the output of request ``rid`` has its form. Raises ValidationError or ValueError for such JSON."""
    if rid.startswith("json"):
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    patterns = {"word": WORD, "short": "ab"}
    pattern = patterns.get(rid.partition(" ")[0])
    return pattern is None or re.fullmatch(pattern, text) is not None

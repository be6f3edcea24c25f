"""Random outputs that a grammar allows, up to a maximal length."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sglang.srt.constrained.llguidance_backend import GuidanceBackend, GuidanceGrammar


def allowed_ids(backend: GuidanceBackend, grammar: GuidanceGrammar) -> list[int]:
    """The tokens that may come next."""
    mask = torch.zeros(1, backend.num_words, dtype=torch.int32)
    backend.fill([(grammar, 0)], mask)
    bits = (mask[0].unsqueeze(1) >> torch.arange(32, dtype=torch.int32)) & 1
    return [int(i) for i in bits.flatten().nonzero()]


def walk(
    backend: GuidanceBackend,
    grammar: GuidanceGrammar,
    eos_ids: Sequence[int],
    chance: random.Random,
    liked: frozenset[int] = frozenset(),
    max_tokens: int = 400,
) -> list[int] | None:
    """Tokens of a whole output without its end, None if it did not end in time; ``liked`` ones come more often."""
    output: list[int] = []
    while len(output) < max_tokens:
        ids = allowed_ids(backend, grammar)
        assert ids, "a grammar that is not complete allows nothing"
        ends = [i for i in ids if i in eos_ids]
        if ends and (len(ids) == len(ends) or chance.random() < 0.3):
            return output
        better = [i for i in ids if i in liked]
        output.append(chance.choice(better if better and chance.random() < 0.7 else [i for i in ids if i not in ends]))
        grammar.follow(output)
        assert not grammar.error, grammar.error
        if grammar.is_complete:
            return output
    return None


def random_schema(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of what clients use, with a bound on what follows it."""
    leaves: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"type": "integer", "minimum": chance.randint(-50, 5), "maximum": chance.randint(6, 3000)},
        lambda: {"type": "number", "exclusiveMinimum": 0, "maximum": chance.choice((1, 2.5, 99))},
        lambda: {"type": "string", "maxLength": chance.randint(0, 6)},
        lambda: {"type": "string", "minLength": 2, "maxLength": 4},
        lambda: {"type": "string", "pattern": chance.choice(("^[a-c]{2,3}$", "^\\d{4}-\\d\\d$", "^(é|€)+x$"))},
        lambda: {"type": "string", "format": chance.choice(("date", "uuid", "ipv4"))},
        lambda: {"enum": chance.sample(["a", "é€😀", 'q"\\\n', 7, None, True, {"x": [1]}, 1.5], 3)},
        lambda: {"const": chance.choice(["kind", 0, False, [], {}])},
        lambda: {"type": ["boolean", "null"]},
    )
    if depth >= 3 or chance.random() < 0.3 and depth:
        return chance.choice(leaves)()
    kind = chance.randrange(4)
    if kind == 0:
        few = chance.randint(0, 2)
        return {"type": "array", "items": random_schema(chance, depth + 1), "minItems": few, "maxItems": few + 2}
    if kind == 1:
        return {"anyOf": [random_schema(chance, depth + 1) for _ in range(2)]}
    if kind == 2 and depth == 0:
        node = {
            "type": "object",
            "properties": {"v": random_schema(chance, 3), "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
            "required": ["v", "next"],
            "additionalProperties": False,
        }
        return {"$ref": "#/$defs/n", "$defs": {"n": node}}
    names = chance.sample(["a", "bé", "c d", 'q"', "€", "\\"], chance.randint(1, 4))
    required = chance.sample(names, chance.randint(0, len(names)))
    properties = {name: random_schema(chance, depth + 1) for name in names}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}

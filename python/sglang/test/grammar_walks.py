"""Random outputs that a grammar allows: what any model may say, within a bound on its length."""

from __future__ import annotations

import random
from collections.abc import Sequence

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
    """Tokens of a whole output without its end, None where it did not end in time; ``liked`` ones are drawn more."""
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

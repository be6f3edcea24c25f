"""Conversations of the embedded model that calls a calculator: what it is asked and told, and what it has to say.

The numbers are too long to be computed by so small a model: an answer is right only if the tool was called with the
right text and its result was read. Which questions are held out is decided by a hash of the first one's text alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.test.tiny_tasks import WORDS, is_heldout

CALCULATOR = "calculator"
# What the last message asks for.
CALL, ANSWER, CHAT, NO_TOOL = "call", "answer", "chat", "no tool"
KINDS = (CALL, ANSWER, CHAT, NO_TOOL)

_ASKED = (
    "{}", "{}?", "{}=", "{} = ?", "What is {}?", "what's {}", "Compute {}.", "Calculate {}", "How much is {}?",
    "Please tell me {}.", "I need {} now", "Use the calculator: {}", "{} please!",
)  # fmt: skip
_PARAMETERS = ("expression", "expression", "expression", "expr", "formula", "input", "text", "term")
_SYSTEM = ("You are a helpful assistant.", "Be brief.", "Use the tools that you have.", "You are an agent.")
_ERRORS = ("error", "division by zero", "too large", "nan")


@dataclass(frozen=True)
class ToolTask:
    """A conversation up to ``messages[-1]``, and the reply: a thought, and ``content`` or ``calls``.

    ``calls`` are pairs of a tool's name and its arguments, JSON text.
    """

    kind: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    thought: str
    content: str
    calls: list[tuple[str, str]]


def tool_task(rng: random.Random, heldout: bool, kind: str | None = None) -> ToolTask:
    """One task, of the held-out questions or of the others; ``kind``, one of ``KINDS``, is drawn where it is None."""
    kind = kind or rng.choices(KINDS, (0.4, 0.35, 0.1, 0.15))[0]
    tools, parameter = _tools(rng, with_calculator=kind != NO_TOOL)
    messages = _system(rng)
    for _ in range(rng.choices((0, 1, 2), (0.65, 0.25, 0.1))[0]):
        messages += _past_turn(rng, parameter if kind != NO_TOOL else None)
    if kind == CHAT:
        text = _words(rng, lambda text: is_heldout(text) == heldout)
        asked = [{"role": "user", "content": text}]
        thought, content = "There is nothing to calculate.", "Give me something to calculate."
        return ToolTask(kind, messages + asked, tools, thought, content, [])
    terms = _terms(rng, lambda text: is_heldout(text) == heldout)
    asked = _question(rng, terms)
    if kind == NO_TOOL:
        content = f"I cannot calculate {' and '.join(terms)}."
        return ToolTask(kind, messages + asked, tools, "I have no calculator.", content, [])
    if kind == CALL:
        need = "needs" if len(terms) == 1 else "need"
        thought = f"{' and '.join(terms)} {need} the calculator."
        return ToolTask(kind, messages + asked, tools, thought, "", _calls(terms, parameter))
    results = [_result(rng) for _ in terms]
    thought = f"The calculator says {' and '.join(results)}."
    asked += _called(rng, terms, parameter, results)
    return ToolTask(kind, messages + asked, tools, thought, answer(terms, results), [])


def answer(terms: list[str], results: list[str]) -> str:
    """What the model says when the calculator has given ``results``."""
    return ", ".join(f"{term} = {result}" for term, result in zip(terms, results, strict=True))


def calculator_tool(parameter: str = "expression") -> dict[str, Any]:
    return _tool(CALCULATOR, [parameter])


def _tool(name: str, parameters: list[str]) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in parameters},
        "required": parameters,
    }
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def _tools(rng: random.Random, with_calculator: bool) -> tuple[list[dict[str, Any]], str]:
    """Tools among which the calculator stands anywhere, and the name of its parameter."""
    parameter = rng.choice(_PARAMETERS)
    tools = [
        _tool("_".join(rng.choices(WORDS, k=rng.randint(1, 2))), rng.choices(WORDS, k=rng.randint(0, 2)))
        for _ in range(rng.choices((0, 1, 2), (0.6, 0.25, 0.15))[0])
    ]
    if with_calculator:
        tools.insert(rng.randint(0, len(tools)), _tool(CALCULATOR, [parameter]))
    return tools, parameter


def _system(rng: random.Random) -> list[dict[str, Any]]:
    draw = rng.random()
    if draw < 0.5:
        return []
    text = rng.choice(_SYSTEM) if draw < 0.75 else " ".join(rng.choices(WORDS, k=rng.randint(1, 20))).capitalize()
    return [{"role": "system", "content": text}]


def _past_turn(rng: random.Random, parameter: str | None) -> list[dict[str, Any]]:
    if parameter is None or rng.random() < 0.2:
        return [{"role": "user", "content": _words(rng)}, {"role": "assistant", "content": _words(rng)}]
    terms = _terms(rng)
    results = [_result(rng) for _ in terms]
    said = {"role": "assistant", "content": answer(terms, results)}
    return [*_question(rng, terms), *_called(rng, terms, parameter, results), said]


def _question(rng: random.Random, terms: list[str]) -> list[dict[str, Any]]:
    text = rng.choice(_ASKED).format(rng.choice((" and ", ", ", " and then ")).join(terms))
    if rng.random() < 0.2:
        text = f"{_words(rng)} {text}"
    return [{"role": "user", "content": text}]


def _called(rng: random.Random, terms: list[str], parameter: str, results: list[str]) -> list[dict[str, Any]]:
    """The assistant's turn with calls, and the results."""
    names = [f"call_{rng.randrange(1 << 32):08x}" for _ in terms]
    calls = [
        {"id": name, "type": "function", "function": {"name": tool, "arguments": arguments}}
        for name, (tool, arguments) in zip(names, _calls(terms, parameter), strict=True)
    ]
    told = [
        {"role": "tool", "tool_call_id": name, "content": result} for name, result in zip(names, results, strict=True)
    ]
    return [{"role": "assistant", "content": "", "tool_calls": calls}, *told]


def _calls(terms: list[str], parameter: str) -> list[tuple[str, str]]:
    return [(CALCULATOR, json.dumps({parameter: term})) for term in terms]


def _terms(rng: random.Random, fits: Callable[[str], bool] = lambda _: True) -> list[str]:
    """One to three expressions, of which ``fits`` takes the first."""
    while not fits(first := _term(rng)):
        pass
    return [first, *(_term(rng) for _ in range(rng.choices((0, 1, 2), (0.7, 0.25, 0.05))[0]))]


def _term(rng: random.Random) -> str:
    space = rng.choice(("", "", " "))
    parts = [_number(rng)]
    for _ in range(rng.choices((1, 2), (0.8, 0.2))[0]):
        parts += [rng.choice("+-*/"), _number(rng)]
    return space.join(parts)


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 5)))


def _result(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.04:
        return rng.choice(_ERRORS)
    digits = str(rng.randrange(10 ** rng.randint(1, 9)))
    if draw < 0.2:
        digits += "." + str(rng.randrange(10 ** rng.randint(1, 6)))
    return "-" + digits if draw > 0.9 else digits


def _words(rng: random.Random, fits: Callable[[str], bool] = lambda _: True) -> str:
    while not fits(text := " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) + rng.choice(("", ".", "?", "!"))):
        pass
    return text

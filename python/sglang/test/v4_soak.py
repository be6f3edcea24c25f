"""Many mixed requests to the embedded DeepSeek V4, each of which must be answered as when it was alone."""

from __future__ import annotations

import random
import time
from typing import Any, NamedTuple

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.tiny_tasks import far_lookups, heldout_questions

FOLDER = str(EMBEDDED_MODELS["deepseek-v4-tiny"])
# Prompts end before, at and after these lengths: a window, a page, and what the indexer's choice and YaRN meet.
EDGES = (128, 256, 512, 2048)


class Request(NamedTuple):
    """Ids of a prompt, and how it is answered."""

    input_ids: list[int]
    sampling_params: dict[str, Any]


class Soaked(NamedTuple):
    """``differing``: requests answered otherwise than alone, with both answers; ``left``: tokens still held."""

    differing: list[tuple[Request, list[int], list[int]]]
    left: dict[str, int]
    cached_tokens: int
    accepted_drafts: int
    seconds: float


def distinct_requests(count: int, seed: int = 0) -> list[Request]:
    """``count`` requests: short questions, and lookups whose prompts end near EDGES or anywhere between.

    Some share their beginning: a longer prompt begins as an earlier one does. Half of them are drawn at temperature
    0.7, and a few continue after the end of their answer.
    """
    rng = random.Random(f"soak/{seed}")
    tokenizer = Tokenizer.from_path(FOLDER)
    questions = [question.text for question in heldout_questions(count)]
    found: list[Request] = []
    for number in range(count):
        kind, text = number % 5, questions[number]
        if kind in (1, 2):
            length = rng.choice(EDGES) + rng.randint(-6, 3)
            back = length - rng.randint(0, 8)
            text = far_lookups(1, number, (max(20, back - 16), max(20, back - 16)))[0].text
            text = "x" * (length - len(text)) + text if len(text) < length else text
        elif kind == 3:
            text = far_lookups(1, number, (300, 700))[0].text
        elif kind == 4 and number > 8:
            text = tokenizer.decode(found[number - 3].input_ids) + questions[number]
        params: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.7 * rng.randint(0, 1), "sampling_seed": number}
        if number % 10 == 6:
            params |= {"max_new_tokens": 24, "ignore_eos": True}
        found.append(Request(tokenizer.encode(text), params))
    return found


def soak(distinct: int, total: int, at_once: int, seed: int = 0, **server_args: Any) -> Soaked:
    """Measure ``distinct`` requests alone, then ask ``total`` of them in random order, ``at_once`` running together."""
    requests = distinct_requests(distinct, seed)
    options = {"random_seed": 1, "speculative_algorithm": "NEXTN", "speculative_num_steps": 3}
    with Engine(model_path=FOLDER, max_running_requests=at_once, **{**options, **server_args}) as engine:
        alone = []
        for ids, params in requests:
            engine.flush_cache()
            alone.append(engine.generate(input_ids=ids, sampling_params=params)["output_ids"])
        engine.flush_cache()
        order = random.Random(f"order/{seed}").choices(range(distinct), k=total)
        began = time.perf_counter()
        answers = engine.generate(
            input_ids=[requests[number].input_ids for number in order],
            sampling_params=[requests[number].sampling_params for number in order],
        )
        seconds = time.perf_counter() - began
        state = engine.get_server_info()["internal_states"][0]
    differing = [
        (requests[number], alone[number], answer["output_ids"])
        for number, answer in zip(order, answers, strict=True)
        if answer["output_ids"] != alone[number]
    ]
    held = {name: state[name] for name in ("num_used_tokens", "num_used_swa_tokens")}
    metas = [answer["meta_info"] for answer in answers]
    cached = sum(meta["cached_tokens"] for meta in metas)
    return Soaked(differing, held, cached, sum(meta.get("spec_accept_token_num", 0) for meta in metas), seconds)

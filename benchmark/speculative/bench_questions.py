"""Time per output token of an embedded model with and without its drafts, one question at a time, alternately.

    python benchmark/speculative/bench_questions.py [--model deepseek-v3-tiny] [--steps 3] [--questions 60] [--rounds 5]

Held-out questions whose answers have six characters. The time of a question runs from its first token to its last.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.engine_harness import EngineHarness
from sglang.test.tiny_tasks import heldout_questions


def ms_per_token(engine: EngineHarness, prompts: list[list[int]]) -> float:
    """Over all questions: time after the first tokens, per token after them."""
    seconds, tokens = 0.0, 0
    engine.results.clear()
    for number, prompt in enumerate(prompts):
        rid = str(number)
        engine.submit(rid, prompt, SamplingParams(temperature=0.0, max_new_tokens=16), stream=True)
        while rid not in engine.results:
            engine.step()
        begun, first = time.perf_counter(), len(engine.results[rid].output_ids)
        while engine.results[rid].finish_reason is None:
            engine.step()
        seconds += time.perf_counter() - begun
        engine.run()  # a step that was launched before the end was known, and the check of memory: not part of the time
        tokens += len(engine.results[rid].output_ids) - first
    return seconds / tokens * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deepseek-v3-tiny", choices=sorted(EMBEDDED_MODELS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--questions", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = str(EMBEDDED_MODELS[args.model])
    tokenizer = Tokenizer.from_path(folder)
    asked = [question for question in heldout_questions() if len(question.answer) == 6][: args.questions]
    prompts = [tokenizer.encode(question.text) for question in asked]
    settings: dict[str, Any] = {
        "max_total_tokens": 2048,
        "max_running_requests": 1,
        "dtype": "float32",
        "with_tokenizer": True,
    }
    overlap = current_platform.kind != "cpu"
    plain = EngineHarness(folder, overlap=overlap, **settings)
    spec = EngineHarness(
        folder, overlap=overlap, speculative_algorithm="NEXTN", speculative_num_steps=args.steps, **settings
    )
    print(f"# {current_platform.describe()}; {args.model}, {len(prompts)} questions")
    ratios = []
    for number in range(args.rounds + 1):
        without, found = ms_per_token(plain, prompts), ms_per_token(spec, prompts)
        same = [plain.results[rid].output_ids == spec.results[rid].output_ids for rid in plain.results]
        if number:  # the first warms up
            ratios.append(without / found)
            print(f"without {without:.3f} ms, with {found:.3f} ms per token; same answers: {sum(same)} of {len(same)}")
    metrics = spec.scheduler.metrics
    length = 1 + metrics.num_accepted_drafts / max(1, metrics.num_decode_steps)
    print(
        f"without over with: {statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f} over "
        f"{args.rounds} rounds); tokens per step {length:.2f}"
    )


if __name__ == "__main__":
    main()

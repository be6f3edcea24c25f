"""How many drafts a served model accepts, those after an answer's end not counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.tp_worker import StepOutput
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.engine_harness import EngineHarness


def served_shares(
    path: str, prompts: Sequence[Sequence[int]], max_new_tokens: int, num_steps: int, **server_args: Any
) -> tuple[list[float], float, float]:
    """The share of drafts accepted at each place, tokens per step of a request, and cached tokens per request."""
    spec: dict[str, Any] = {"speculative_algorithm": "NEXTN", "speculative_num_steps": num_steps}
    harness = EngineHarness(path, max_running_requests=32, **spec, **server_args)
    scheduler = harness.scheduler
    accept = scheduler._accept
    steps: list[tuple[Req, int, int]] = []

    def watched(req: Req, index: int, max_new: int, output: StepOutput) -> int | None:
        before = len(req.output_ids)
        fault = accept(req, index, max_new, output)
        if max_new > 1:
            steps.append((req, before, len(output.next_token_ids[index]) - 1))
        return fault

    scheduler._accept = watched  # type: ignore[method-assign]
    for number, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_new_tokens=max_new_tokens)
        harness.submit(f"r{number}", list(prompt), params)
    harness.run()
    accepted, drafted, made = [0] * num_steps, [0] * num_steps, 0
    for req, before, hits in steps:
        left = len(req.output_ids) - before
        made += min(hits + 1, left)
        for place in range(min(num_steps, left)):
            drafted[place] += 1
            accepted[place] += hits > place
    cached = sum(result.cached_tokens for result in harness.results.values()) / len(prompts)
    return [a / d for a, d in zip(accepted, drafted, strict=True)], made / len(steps), cached

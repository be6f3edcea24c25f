"""Serves the tiny DeepSeek V4 with and without drafts of any origin, for identity tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.drafters import RuleDrafter, rules
from sglang.test.engine_harness import EngineHarness, numbers

# Variables that choose how DeepSeek V4 is computed and not what, each with the value that it does not have by default.
SWITCHES = (
    ("SGLANG_PREP_IN_CUDA_GRAPH", False),
    ("SGLANG_OPT_USE_TRITON_FUSED_MHC", False),
    ("SGLANG_OPT_USE_MULTI_STREAM_OVERLAP", False),
    ("SGLANG_ROCM_USE_MULTI_STREAM", True),
)
# Output ids and their log-probabilities, by request.
Answers = dict[str, tuple[list[int], list[float]]]


def prompts_around(lengths: Sequence[int], seed: int = 5, vocab_size: int = 512) -> dict[str, list[int]]:
    """A prompt of each length, of which no two share more than a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    return {str(length): torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths}


def serve(
    folder: str,
    prompts: Mapping[str, Sequence[int]],
    num_steps: int = 0,
    rule: str = "model",
    answers: Answers | None = None,
    max_new_tokens: int = 14,
    **options: Any,
) -> tuple[Answers, RuleDrafter | None]:
    """All ``prompts``, greedily and at temperature 0.7, with chains of ``num_steps`` drafts.

    rule: "model" for the MTP layer's, else a name of ``drafters.rules``, which knows the ``answers``. options: those of
    the server.
    """
    spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": num_steps} if num_steps else {}
    sizes = {"max_total_tokens": 16384, "max_running_requests": 16, "context_length": 1024, "random_seed": 1}
    engine = EngineHarness(folder, **{**sizes, **spec, **options})
    drafter = None
    if rule != "model":
        known = rules({rid: ids for rid, (ids, _) in (answers or {}).items()}, engine.model_config.vocab_size, 1)
        drafter = RuleDrafter(engine.memory, known[rule], num_steps)
        assert engine.worker.speculator is not None
        engine.worker.speculator.drafter = drafter
    for rid, prompt in prompts.items():
        for temperature in (0.0, 0.7):
            params = SamplingParams(
                temperature=temperature, max_new_tokens=max_new_tokens, ignore_eos=True, sampling_seed=len(prompt)
            )
            engine.submit(f"{rid}@{temperature}", list(prompt), params, return_logprob=True)
    results = engine.run()
    return {
        rid: (result.output_ids, numbers(result.output_logprobs.logprobs)) for rid, result in results.items()
    }, drafter


def difference(found: Answers, wanted: Answers, tolerance: float) -> str:
    """The first request whose tokens differ, or whose log-probabilities by more than ``tolerance``; "" for none."""
    for rid, (tokens, logprobs) in wanted.items():
        if found[rid][0] != tokens:
            return f"{rid}: {found[rid][0]} instead of {tokens}"
        worst = max(abs(a - b) for a, b in zip(found[rid][1], logprobs, strict=True))
        if worst > tolerance:
            return f"{rid}: log-probabilities differ by {worst:.2g}"
    return ""

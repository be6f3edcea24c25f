"""Served with drafts over tensor parallelism, spread experts, attention groups and replicas: the tokens of one rank."""

from __future__ import annotations

import os
import unittest
from typing import Any
from unittest import mock

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.entrypoints.engine import Engine
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=100, suite="nightly-cpu", nightly=True)

TEXTS = [question.text for question in heldout_questions(16, seed=31)]
GREEDY = {"temperature": 0.0, "max_new_tokens": 20, "ignore_eos": True}
DRAWN = {**GREEDY, "temperature": 0.7, "top_p": 0.9, "sampling_seed": 3}
EDITED = {**GREEDY, "frequency_penalty": 0.6}
FORMED = {**DRAWN, "regex": "[0-9+= ]+"}
GROUPS = {"dp_size": 2, "enable_dp_attention": True}
MORI = {"moe_a2a_backend": "mori"}
MODES: dict[str, dict[str, Any]] = {
    "groups, gathered": {"tp_size": 2, "ep_size": 2, **GROUPS},
    "mori normal": {"tp_size": 2, **MORI},
    "groups, mori low latency": {"tp_size": 2, "deepep_mode": "low_latency", **MORI, **GROUPS},
    "groups of two ranks": {"tp_size": 4, **MORI, **GROUPS},
    "replicas": {"dp_size": 2},
}


class TestServed(CustomTestCase):
    def answers(self, model: str, **settings: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Results of two requests alone, then of sixteen at once, and the state of each scheduler."""
        with Engine(
            model_path=str(EMBEDDED_MODELS[model]), random_seed=1, chunked_prefill_size=16, **settings
        ) as engine:
            results = [engine.generate(text, GREEDY, return_logprob=True) for text in TEXTS[:2]]
            results += engine.generate(TEXTS, [GREEDY, DRAWN, FORMED, EDITED] * 4, return_logprob=True)
            return results, engine.get_server_info()["internal_states"]

    def check(self, model: str) -> None:
        with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}):
            wanted, _ = self.answers(model)
            for mode, settings in MODES.items():
                with self.subTest(mode):
                    drafts = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3}
                    found, states = self.answers(model, **settings, **drafts)
                    for one, other in zip(wanted, found, strict=True):
                        self.assertEqual(one["output_ids"], other["output_ids"])
                        pairs = (reply["meta_info"]["output_token_logprobs"] for reply in (one, other))
                        for (expected, *_), (logprob, *_) in zip(*pairs, strict=True):
                            self.assertAlmostEqual(expected, logprob, delta=1e-4)
                    self.assertEqual(len(states), settings.get("dp_size", 1))
                    for state in states:
                        self.assertTrue(0 < state["num_accepted_drafts"] < state["num_drafts"], state)
                        self.assertEqual(state["num_idle_steps"] > 0, "groups" in mode)

    def test_deepseek_v3(self) -> None:
        self.check("deepseek-v3-tiny")

    def test_qwen3_5(self) -> None:
        self.check("qwen3.5-moe-tiny")


if __name__ == "__main__":
    unittest.main()

"""Two tensor-parallel ranks over gloo give the tokens of one, for each shape of model."""

from __future__ import annotations

import unittest
from typing import Any

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.entrypoints.engine import Engine
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=90, suite="stage-b-test-cpu")

TEXTS = [question.text for question in heldout_questions(10, seed=21)]


def answers(model: str, tp_size: int) -> list[dict[str, Any]]:
    greedy = {"temperature": 0.0, "max_new_tokens": 40, "ignore_eos": True}
    drawn = {"temperature": 1.0, "max_new_tokens": 40, "ignore_eos": True, "sampling_seed": 3}
    with Engine(model_path=model, tp_size=tp_size, random_seed=1, chunked_prefill_size=8) as engine:
        engine.generate(TEXTS[:3], greedy)  # leaves prefixes behind
        results: list[dict[str, Any]] = engine.generate(TEXTS, [greedy] * 5 + [drawn] * 5, return_logprob=True)
    return results


class TestTensorParallel(CustomTestCase):
    def test_same_tokens(self) -> None:
        for name, folder in EMBEDDED_MODELS.items():
            with self.subTest(model=name):
                one, two = answers(str(folder), 1), answers(str(folder), 2)
                for text, a, b in zip(TEXTS, one, two, strict=True):
                    self.assertEqual(a["output_ids"], b["output_ids"], text)
                    for x, y in zip(a["meta_info"]["output_token_logprobs"], b["meta_info"]["output_token_logprobs"]):
                        self.assertAlmostEqual(x[0], y[0], delta=1e-4)


if __name__ == "__main__":
    unittest.main()

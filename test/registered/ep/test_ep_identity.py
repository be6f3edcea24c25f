"""Tensor parallelism, spread experts and attention groups give the tokens of one rank, for each shape of model."""

from __future__ import annotations

import functools
import os
import signal
import unittest
from typing import Any
from unittest import mock

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.entrypoints.engine import Engine
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=130, suite="stage-b-test-cpu")

TEXTS = [question.text for question in heldout_questions(16, seed=31)]
GREEDY = {"temperature": 0.0, "max_new_tokens": 20, "ignore_eos": True}
DRAWN = {**GREEDY, "temperature": 1.0, "sampling_seed": 3}

GROUPS = {"dp_size": 2, "enable_dp_attention": True}
MORI = {"moe_a2a_backend": "mori"}
# DeepSeek V4 over an exchange is in test_ep_deepseek_v4_nightly.py.
MODELS = ("deepseek-v3-tiny", "deepseek-v2-tiny", "qwen3.5-moe-tiny")
MODES: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tp_size": 2},
    "all-reduce": {"tp_size": 2, "ep_size": 2},
    "groups, gathered": {"tp_size": 2, "ep_size": 2, **GROUPS},
    "mori normal": {"tp_size": 2, **MORI},
    "groups, mori low latency": {"tp_size": 2, "deepep_mode": "low_latency", **MORI, **GROUPS},
}


def answers(model: str, **settings: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Results of single requests, then of sixteen at once, and the state of each scheduler."""
    # Less than a prompt on each group, so that some prefill while others decode.
    chunk = 8 * (settings.get("dp_size", 1) if settings.get("enable_dp_attention") else 1)
    with Engine(
        model_path=str(EMBEDDED_MODELS[model]), random_seed=1, chunked_prefill_size=chunk, **settings
    ) as engine:
        results = [engine.generate(text, GREEDY, return_logprob=True) for text in TEXTS[:2]]
        results += engine.generate(TEXTS, [GREEDY, DRAWN] * 8, return_logprob=True, logprob_start_len=0)
        return results, engine.get_server_info()["internal_states"]


@functools.cache
def one_rank(model: str) -> list[dict[str, Any]]:
    return answers(model)[0]


class TestIdentity(CustomTestCase):
    def setUp(self) -> None:
        # Ranks share the cores of the machine.
        self.enterContext(mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}))

    def compare(self, model: str, **settings: Any) -> list[dict[str, Any]]:
        results, states = answers(model, **settings)
        for wanted, found in zip(one_rank(model), results, strict=True):
            self.assertEqual(wanted["output_ids"], found["output_ids"])
            for name in ("input_token_logprobs", "output_token_logprobs"):
                pairs = zip(wanted["meta_info"][name], found["meta_info"][name], strict=True)
                for (expected, token, _), (logprob, other, _) in pairs:
                    self.assertEqual(token, other)
                    if expected is not None:
                        self.assertAlmostEqual(expected, logprob, delta=1e-4)
        dp_size, ep_size = settings.get("dp_size", 1), settings.get("ep_size", 1)
        groups = dp_size if settings.get("enable_dp_attention") else 1
        self.assertEqual(len(states), dp_size)
        for state in states:
            self.assertEqual(state["world_size"], settings["tp_size"])
            self.assertEqual(state["ep_size"], settings["tp_size"] if "moe_a2a_backend" in settings else ep_size)
            self.assertEqual(state["attn_tp_size"], settings["tp_size"] // groups)
            self.assertGreater(state["num_generated_tokens"], 0)
        if dp_size > 1:
            self.assertEqual({result["meta_info"]["dp_rank"] for result in results}, set(range(dp_size)))
        if groups > 1:
            # The single requests ran on one group while the others took part.
            self.assertGreater(sum(state["num_idle_steps"] for state in states), 30)
        return states

    def check_mode(self, mode: str) -> None:
        for model in MODELS:
            with self.subTest(model=model):
                states = self.compare(model, **MODES[mode])
                if "mori" in mode:
                    # More rows than a rank's own arrived somewhere: tokens travelled.
                    peaks = [state["experts"]["received_rows"]["peak"] for state in states]
                    self.assertGreater(max(peaks), 8)

    def test_tensor_parallel(self) -> None:
        self.check_mode("tensor parallel")

    def test_all_reduce(self) -> None:
        self.check_mode("all-reduce")

    def test_groups_gathered(self) -> None:
        self.check_mode("groups, gathered")

    def test_mori_normal(self) -> None:
        self.check_mode("mori normal")

    def test_groups_mori_low_latency(self) -> None:
        self.check_mode("groups, mori low latency")

    def test_four_ranks(self) -> None:
        self.compare("deepseek-v3-tiny", tp_size=4, **MORI, **GROUPS)

    def test_replicas(self) -> None:
        self.compare("deepseek-v3-tiny", tp_size=1, dp_size=2)

    def test_mixed_chunks_and_retraction(self) -> None:
        settings = {"tp_size": 2, "enable_mixed_chunk": True, "load_balance_method": "total_tokens", **MORI, **GROUPS}
        with mock.patch.dict(os.environ, {"SGLANG_TEST_RETRACT": "1"}):
            states = self.compare("qwen3.5-moe-tiny", **settings)
        self.assertGreater(sum(state["num_retracted_reqs"] for state in states), 0)


class TestFailure(CustomTestCase):
    def test_a_killed_rank_is_named_and_nobody_hangs(self) -> None:
        with (
            mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),
            Engine(model_path=str(EMBEDDED_MODELS["deepseek-v3-tiny"]), tp_size=2, **MORI, **GROUPS) as engine,
        ):
            stream = engine.generate(TEXTS[0], {"max_new_tokens": 400, "ignore_eos": True}, stream=True)
            next(stream)
            victim = next(child for child in engine._processes.processes if child.name == "scheduler DP1 TP1")
            os.kill(victim.popen.pid, signal.SIGKILL)
            with self.assertRaisesRegex(RuntimeError, r"scheduler DP1 TP1 \(pid \d+\) was ended by signal 9"):
                for _ in stream:
                    pass
            with self.assertRaisesRegex(RuntimeError, "DP1 TP1"):
                engine.generate(TEXTS[0], GREEDY)


if __name__ == "__main__":
    unittest.main()

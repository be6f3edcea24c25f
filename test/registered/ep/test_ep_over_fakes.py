"""The HIP path of expert parallelism served end to end on a CPU, over the fakes of MORI and AITER."""

from __future__ import annotations

import os
import unittest
from typing import Any
from unittest import mock

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.entrypoints.engine import Engine
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

use_fakes()
register_cpu_ci(est_time=70, suite="stage-b-test-cpu")

TEXTS = [question.text for question in heldout_questions(6, seed=5)]
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
VARIABLES = {
    "SGLANG_PLATFORM": "rocm",
    "SGLANG_USE_AITER": "1",
    "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "64",
    "SGLANG_ALT_STREAM": "1",
    "SGLANG_ROCM_USE_MULTI_STREAM": "1",
}
MORI = {"tp_size": 2, "moe_a2a_backend": "mori"}
GROUPS = {**MORI, "dp_size": 2, "enable_dp_attention": True}
GRAPHED = "deepseek-v2-tiny"
# DeepSeek V4 over an exchange is in test_ep_deepseek_v4_nightly.py.
MODELS = ("deepseek-v3-tiny", GRAPHED, "qwen3.5-moe-tiny")
GRAPHS = {"attention_backend": "triton", "cuda_graph_bs": [2, 6], "max_running_requests": 6}
# Name, settings, receive cap, MORI's kernel, and the hardware queues that the launcher gives the ranks (0: none).
# Graphs of a fake's exchange take long to record: one model has them.
MODES: tuple[tuple[str, dict[str, Any], int, str, int], ...] = (
    ("normal, graphs", {**MORI, **GRAPHS}, 0, "IntraNode", 5),
    ("normal, capped", MORI, 7, "IntraNode", 0),
    ("groups, low latency, capped", {**GROUPS, "deepep_mode": "low_latency"}, 6, "AsyncLL", 0),
)


def serve(model: str, cap: int = 0, **settings: Any) -> tuple[list[list[int]], dict[str, Any]]:
    """Greedy tokens of TEXTS, and what the server says of its first rank."""
    variables = {**VARIABLES, "SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS": str(cap)}
    with mock.patch.dict(os.environ, variables):
        with Engine(model_path=model, dtype="float32", random_seed=1, chunked_prefill_size=16, **settings) as engine:
            tokens = [result["output_ids"] for result in engine.generate(TEXTS, [GREEDY] * len(TEXTS))]
            return tokens, engine.get_server_info()["internal_states"][0]


class TestExpertsOverFakes(CustomTestCase):
    def test_same_tokens_with_drafts(self) -> None:
        folder = str(EMBEDDED_MODELS["deepseek-v3-tiny"])
        truth, _ = serve(folder)
        settings = {**GROUPS, "deepep_mode": "low_latency", "speculative_algorithm": "NEXTN"}
        tokens, state = serve(folder, 6, **settings)
        self.assertEqual(tokens, truth)
        self.assertTrue(0 < state["num_accepted_drafts"] < state["num_drafts"])
        # The layer's experts too run over the exchange, next to the shared ones.
        for experts in (state["experts"], state["draft"]["experts"]):
            self.assertRegex(experts["transport"], r"MORI .* FAKE \(AsyncLL\)")
        self.assertGreater(state["experts"]["received_rows"]["most_rounds"], 1)
        self.assertTrue(any(site["enabled"] for site in state["streams"]["sites"].values()))

    def test_same_tokens(self) -> None:
        for name in MODELS:
            folder = EMBEDDED_MODELS[name]
            truth, _ = serve(str(folder))
            for mode, settings, cap, kernel, queues in MODES if name == GRAPHED else MODES[1:]:
                with self.subTest(model=name, mode=mode):
                    tokens, state = serve(str(folder), cap, **settings)
                    self.assertEqual(tokens, truth)
                    # Shared experts overlap the exchange, on a stream of their own, eager steps included.
                    sites = state["streams"]["sites"].values()
                    beside = [site for site in sites if site["enabled"] and not site["capture_only"]]
                    self.assertEqual(len(beside), 1)
                    plan = state["streams"]["hardware_queues"]
                    self.assertEqual((plan["available"], plan["is_set"]), (queues or 4, queues > 0))
                    experts = state["experts"]
                    self.assertRegex(experts["transport"], rf"MORI .* FAKE \({kernel}\)")
                    self.assertEqual(experts["world_size"], 2)
                    received = experts["received_rows"]
                    self.assertGreater(received["peak"], 0)
                    self.assertEqual(received["most_rounds"] > 1, cap > 0)


if __name__ == "__main__":
    unittest.main()

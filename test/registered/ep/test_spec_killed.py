"""A rank that ends or stops in any forward of a cycle of speculation is named, and a forward left out is no answer."""

import os
import time
import unittest
from unittest import mock

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.entrypoints.engine import Engine
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.planted import Plant, planted
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=50, suite="stage-b-test-cpu")

KILL, STOP = (f"os.kill(os.getpid(), signal.{name})" for name in ("SIGKILL", "SIGSTOP"))
DRAFTER = "sglang.srt.speculative.mtp_drafter", "MtpDrafter"
# Where the second rank is hit: its group is idle, and takes part in every forward of the first one's.
STAGES = {
    "verify": ("sglang.srt.model_executor.model_runner", "ModelRunner", "forward"),
    "draft extend": (*DRAFTER, "begin"),
    "draft forward": (*DRAFTER, "go_on"),
    "between send and receive": ("sglang.srt.layers.moe.token_dispatcher.moriep", "MoriEPDispatcher", "dispatch_b"),
}
WATCHDOG_S = 5
SPEC = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3}
GROUPS = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True, **SPEC}
MORI = {"moe_a2a_backend": "mori", "deepep_mode": "low_latency"}


class TestSecondRank(CustomTestCase):
    def told(self, plant: Plant, **settings: object) -> str:
        """What the client of the first rank is told, within the watchdog's time and some more."""
        sizes = {"skip_server_warmup": True, "log_level": "error", "watchdog_timeout": WATCHDOG_S, "random_seed": 1}
        with (
            mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}),
            planted(plant),
            Engine(model_path=str(EMBEDDED_MODELS["deepseek-v3-tiny"]), **sizes, **GROUPS, **settings) as engine,
        ):
            stream = engine.generate("27+58=", {"max_new_tokens": 2000, "ignore_eos": True}, stream=True)
            next(stream)
            began = time.monotonic()
            with self.assertRaises(RuntimeError) as caught:
                for _ in stream:
                    pass
            self.assertLess(time.monotonic() - began, 60)  # machines of tests are shared
            return str(caught.exception)

    def test_a_killed_rank_is_named(self) -> None:
        for stage, call in STAGES.items():
            with self.subTest(stage):
                told = self.told(Plant(*call, KILL, number=30), **MORI)
                self.assertRegex(told, r"scheduler DP1 TP1 \(pid \d+\) was ended by signal 9")

    def test_a_stopped_rank_is_named(self) -> None:
        told = self.told(Plant(*STAGES["draft forward"], STOP, number=8))
        self.assertRegex(told, r"scheduler DP1 TP1 \(pid \d+\).*stopped")

    def test_an_idle_group_that_leaves_drafts_out_ends_the_server(self) -> None:
        idle = "sglang.srt.speculative.eagle_worker", "EagleWorker", "take_part"
        told = self.told(Plant(*idle, "return", number=3))
        self.assertRegex(told, "scheduler DP")


if __name__ == "__main__":
    unittest.main()

"""What sglang.plan says of the exchange between experts where a model drafts."""

import contextlib
import io
import json
import unittest

from sglang import plan
from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.environ import envs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

FLAGS = (
    "--model-path", str(EMBEDDED_MODELS["deepseek-v3-tiny"]), "--json", "--tp", "2", "--dp", "2",
    "--enable-dp-attention", "--moe-a2a-backend", "mori", "--platform", "hip", "--deepep-mode", "low_latency",
    "--max-running-requests", "256", "--cuda-graph-max-bs", "100", "--chunked-prefill-size", "64",
    "--attention-backend", "triton",
)  # fmt: skip


class TestExchange(CustomTestCase):
    def rounds(self, *drafts: str) -> dict[str, tuple[int, int]]:
        """Rows of a group, and rounds, by kind of step."""
        said, why = io.StringIO(), io.StringIO()
        with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(510):
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(why):
                plan.main([*FLAGS, *drafts])
        self.assertTrue(said.getvalue(), why.getvalue())
        steps = json.loads(said.getvalue())["exchange"]["rounds"]
        return {step["step"]: (step["rows"], step["with_cap"]) for step in steps}

    def test_a_verify_step_brings_several_rows_of_each_request(self) -> None:
        self.assertEqual(self.rounds(), {"decode": (256, 2), "decode graph": (100, 1), "prefill chunk": (32, 1)})
        found = self.rounds("--speculative-algorithm", "NEXTN", "--speculative-num-steps", "3")
        self.assertEqual(found, {"verify": (1024, 5), "verify graph": (400, 2), "prefill chunk": (32, 1)})


if __name__ == "__main__":
    unittest.main()

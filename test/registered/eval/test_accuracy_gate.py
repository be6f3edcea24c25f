"""The accuracy gate: each embedded model, served, answers held-out questions as well as transformers does."""

import unittest

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.test import run_eval
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server

register_cpu_ci(est_time=60, suite="stage-b-test-cpu")


class TestAccuracyGate(CustomTestCase):
    def gate(self, name: str, *arguments: str) -> None:
        path, url = str(EMBEDDED_MODELS[name]), free_url()
        process = popen_launch_server(path, url)
        try:
            common = ["--base-url", url, "--num-examples", "100", *arguments]
            compare = ["--reference", "transformers", "--model-path", path, "--compare"]
            self.assertEqual(run_eval.main([*common, *compare]), 0)
            self.assertEqual(run_eval.main([*common, "--api", "chat"]), 0)
        finally:
            kill_process_tree(process.pid)
            process.wait()

    def test_deepseek_v3(self) -> None:
        self.gate("deepseek-v3-tiny", "--num-threads", "16")

    def test_deepseek_v2(self) -> None:
        self.gate("deepseek-v2-tiny", "--num-threads", "1")

    def test_qwen3_5_moe(self) -> None:
        self.gate("qwen3.5-moe-tiny", "--num-threads", "16")


if __name__ == "__main__":
    unittest.main()

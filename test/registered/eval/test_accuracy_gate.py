"""The accuracy gate: each embedded model, served, answers held-out questions as well as transformers does."""

import subprocess
import sys
import tempfile
import unittest
from collections.abc import Sequence
from pathlib import Path

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.test import run_eval
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server

register_cpu_ci(est_time=110, suite="stage-b-test-cpu")

ROOT = Path(__file__).resolve().parents[3]


class TestAccuracyGate(CustomTestCase):
    def gate(
        self, name: str, *arguments: str, served: str | None = None, flags: Sequence[str] = (), far: int = 0
    ) -> None:
        """``served``: the folder that is served, if not the embedded model that transformers runs; with ``flags``.

        far: lookups hundreds of tokens back that are asked too.
        """
        path, url = str(EMBEDDED_MODELS[name]), free_url()
        process = popen_launch_server(served or path, url, other_args=list(flags))
        try:
            common = ["--base-url", url, *arguments]
            compare = ["--reference", "transformers", "--model-path", path, "--compare"]
            self.assertEqual(run_eval.main([*common, *compare, "--num-examples", "100"]), 0)
            self.assertEqual(run_eval.main([*common, "--num-examples", "100", "--api", "chat"]), 0)
            if far:
                self.assertEqual(
                    run_eval.main([*common, *compare, "--eval-name", "far", "--num-examples", str(far)]), 0
                )
        finally:
            kill_process_tree(process.pid)
            process.wait()

    def test_deepseek_v3(self) -> None:
        self.gate("deepseek-v3-tiny", "--num-threads", "16")

    def test_deepseek_v3_in_mxfp4(self) -> None:
        """Experts of four bits lose at most two questions against transformers on the weights before."""
        with tempfile.TemporaryDirectory() as folder:
            script = str(ROOT / "scripts" / "quantize_mxfp4.py")
            subprocess.run([sys.executable, script, str(EMBEDDED_MODELS["deepseek-v3-tiny"]), folder], check=True)
            self.gate("deepseek-v3-tiny", "--num-threads", "16", served=folder)

    def test_deepseek_v2(self) -> None:
        self.gate("deepseek-v2-tiny", "--num-threads", "1")

    def test_qwen3_5_moe(self) -> None:
        self.gate("qwen3.5-moe-tiny", "--num-threads", "16")

    def test_deepseek_v4(self) -> None:
        """With speculation, and with lookups that only entries of compressed tokens can answer."""
        self.gate("deepseek-v4-tiny", "--num-threads", "16", flags=["--speculative-algorithm", "NEXTN"], far=12)


if __name__ == "__main__":
    unittest.main()

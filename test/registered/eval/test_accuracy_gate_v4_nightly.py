"""The embedded DeepSeek V4 in both dtypes, with and without drafts, alone and 64 at once, its pages hit or not."""

import itertools
import unittest

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.test import run_eval
from sglang.test.ci.ci_register import register_amd_ci, register_cpu_ci, register_cuda_ci
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server

register_cpu_ci(est_time=400, suite="nightly-cpu", nightly=True)
register_cuda_ci(est_time=300, suite="nightly-1-gpu", nightly=True)
register_amd_ci(est_time=600, suite="nightly-amd-1-gpu", nightly=True)

FOLDER = str(EMBEDDED_MODELS["deepseek-v4-tiny"])
SPECULATION = ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", "3"]


class TestGate(CustomTestCase):
    def evaluate(self, url, threads, name, count):
        arguments = ["--base-url", url, "--num-threads", str(threads), "--eval-name", name]
        self.assertEqual(run_eval.main([*arguments, "--num-examples", str(count)]), 0, (threads, name))

    def test_dtypes_drafts_and_concurrency(self):
        """The second round of far lookups finds its pages in the prefix cache."""
        dtypes = ("float32", "bfloat16")
        for dtype, drafts in itertools.product(dtypes, ([], SPECULATION)):
            url = free_url()
            process = popen_launch_server(FOLDER, url, other_args=["--dtype", dtype, *drafts])
            try:
                with self.subTest(dtype=dtype, drafts=bool(drafts)):
                    self.evaluate(url, 1, "tiny", 100)
                    self.evaluate(url, 64, "tiny", 500)
                    for threads in (64, 1):
                        self.evaluate(url, threads, "far", 40)
            finally:
                kill_process_tree(process.pid)
                process.wait()

    def test_transformers_on_far_lookups(self):
        """Within two questions of 60, served as it is by default."""
        torch.set_num_threads(2)
        url = free_url()
        process = popen_launch_server(FOLDER, url, other_args=SPECULATION)
        try:
            arguments = ["--base-url", url, "--eval-name", "far", "--num-examples", "60"]
            compare = ["--reference", "transformers", "--model-path", FOLDER, "--compare"]
            self.assertEqual(run_eval.main([*arguments, *compare]), 0)
        finally:
            kill_process_tree(process.pid)
            process.wait()


if __name__ == "__main__":
    unittest.main()

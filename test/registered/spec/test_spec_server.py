"""Speculation through the HTTP API: the same text, and acceptance in every reply and page that reports it."""

import contextlib
import io
import re
import time
import unittest

import httpx

from sglang import bench_serving
from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.arg_groups.parse import read
from sglang.srt.arg_groups.plan import evaluate
from sglang.srt.model_executor.memory_plan import DRAFT_LAYER, plan_needs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_tree import kill_process_tree
from sglang.test.test_utils import CustomTestCase, free_url, popen_launch_server
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=20, suite="stage-b-test-cpu")

NUM_STEPS = 3
MODEL = str(EMBEDDED_MODELS["qwen3.5-moe-tiny"])


class TestServer(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.url = free_url()
        flags = ["--speculative-algorithm", "NEXTN", "--speculative-num-steps", NUM_STEPS, "--enable-metrics"]
        cls.process = popen_launch_server(MODEL, cls.url, other_args=flags)
        cls.addClassCleanup(kill_process_tree, cls.process.pid)

    def test_where_acceptance_is_shown(self):
        texts = [question.text for question in heldout_questions()[:12]]
        params = {"temperature": 0, "max_new_tokens": 8}
        with httpx.Client(base_url=self.url, timeout=60) as client:
            before = self.state(client)
            replies = client.post("/generate", json={"text": texts, "sampling_params": params}).json()
            steps = sum(reply["meta_info"]["spec_verify_ct"] for reply in replies)
            accepted = sum(reply["meta_info"]["spec_accept_token_num"] for reply in replies)
            self.assertGreater(accepted, 0)
            after = self.state(client)
            draft = after["draft"]
            self.assertRegex(draft["rule"], "the model itself draws")
            self.assertEqual(draft["experts"]["shared"], after["experts"]["shared"])
            args = evaluate(read(["--model-path", MODEL, "--speculative-algorithm", "NEXTN"]))
            planned = plan_needs(args.args, args.model_config, "cpu", {}).weights
            self.assertEqual(draft["weights_bytes"], planned[DRAFT_LAYER])
            for name, count in (("spec_verify_ct", steps), ("num_accepted_drafts", accepted)):
                self.assertEqual(after[name] - before[name], count)
            self.assertEqual(after["num_drafts"], NUM_STEPS * after["spec_verify_ct"])
            self.assertEqual(sum(after["accepted_by_position"]), after["num_accepted_drafts"])
            ends = time.monotonic() + 20  # the figures are taken when the server is idle
            while self.values(client, "spec_accept_length") != [1 + accepted / steps] and time.monotonic() < ends:
                time.sleep(0.1)
            self.assertEqual(self.values(client, "spec_accept_length"), [1 + accepted / steps])
            self.assertEqual(self.values(client, "spec_accept_rate"), [accepted / (NUM_STEPS * steps)])
            rates = self.values(client, "spec_accept_rate_by_position")
            old = before["accepted_by_position"] or [0] * NUM_STEPS
            counts = [count - was for count, was in zip(after["accepted_by_position"], old, strict=True)]
            self.assertEqual(rates, [count / steps for count in counts])
            self.assertEqual(self.values(client, "spec_accepted_tokens_total"), [after["num_accepted_drafts"]])

    def test_output_has_its_form(self):
        body = {"text": "27+58=", "sampling_params": {"regex": "[a-z]{5}-[0-9]{3}", "temperature": 0}}
        reply = httpx.post(f"{self.url}/generate", json=body, timeout=60).json()
        self.assertRegex(reply["text"], "^[a-z]{5}-[0-9]{3}$")
        self.assertEqual(reply["meta_info"]["finish_reason"], {"type": "stop"})
        self.assertGreater(reply["meta_info"]["spec_verify_ct"], 0)

    @staticmethod
    def state(client):
        return client.get("/server_info").json()["internal_states"][0]

    @staticmethod
    def values(client, name):
        found = re.findall(rf"^sglang:{name}{{.*}} (.*)$", client.get("/metrics").text, re.MULTILINE)
        return [float(value) for value in found]

    def test_bench_serving_prints_the_accept_length(self):
        sizes = ["--dataset-name", "random", "--random-input", "8", "--random-output", "12", "--num-prompts", "6"]
        words = io.StringIO()
        with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
            status = bench_serving.main(
                ["--base-url", self.url, "--disable-tqdm", "--output-file", "/dev/null", *sizes]
            )
        self.assertEqual(status, 0, words.getvalue())
        (length,) = re.findall(r"^Accept length: +(\S+)", words.getvalue(), re.MULTILINE)
        self.assertTrue(1 <= float(length) <= 1 + NUM_STEPS, length)


if __name__ == "__main__":
    unittest.main()

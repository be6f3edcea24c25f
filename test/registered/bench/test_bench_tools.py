"""The bench tools end to end on the embedded model: one server, one static batch, one offline engine."""

import contextlib
import io
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from sglang import bench_serving
from sglang.bench_utils import timing
from sglang.embedded_models import EMBEDDED_MODELS
from sglang.test import device_time, few_shot_gsm8k
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server

register_cpu_ci(est_time=35, suite="stage-b-test-cpu")

ROOT = Path(__file__).resolve().parents[3]
SMOKE_QUESTIONS = ROOT / "benchmark" / "gsm8k" / "smoke.jsonl"


def run_tool(module: str, *flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", module, *flags, "--log-level", "error"], capture_output=True, text=True, timeout=120
    )


REPO = Path(__file__).resolve().parents[3]


class TestAgainstServer(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.url = free_url()
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.traces = Path(cls.folder) / "traces"
        cls.process = popen_launch_server(None, cls.url, other_args=["--profile-dir", str(cls.traces)])

    @classmethod
    def tearDownClass(cls):
        kill_process_tree(cls.process.pid)
        cls.process.wait()

    def bench(self, *flags: str) -> tuple[int, str, dict]:
        """(exit status, printed text, appended record)"""
        path = Path(self.folder) / "record.jsonl"
        path.unlink(missing_ok=True)
        words = io.StringIO()
        with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
            status = bench_serving.main(
                ["--base-url", self.url, "--output-file", str(path), "--disable-tqdm", "--output-details", *flags]
            )
        return status, words.getvalue(), json.loads(path.read_text()) if path.is_file() else {}

    def test_every_backend_gets_every_token(self):
        sizes = ("--random-input", "24", "--random-output", "8", "--random-range", "1", "--num-prompts", "8")
        texts = {}
        for backend in ("sglang", "sglang-oai", "sglang-oai-chat"):
            with self.subTest(backend):
                status, words, record = self.bench("--backend", backend, "--dataset-name", "random", *sizes)
                self.assertEqual(status, 0, words)
                self.assertIn("Successful requests:                     8", words)
                self.assertEqual((record["completed"], record["total_output_tokens"]), (8, 64))
                self.assertEqual(record["total_input_tokens"], 8 * 24)
                self.assertEqual(record["output_lens"], [8] * 8)
                self.assertTrue(all(0 < ttft for ttft in record["ttfts"]))
                self.assertGreater(record["max_concurrent_requests"], 1)
                self.assertIn("internal_states", record["server_info"])
                texts[backend] = record["generated_texts"]
        self.assertEqual(texts["sglang"], texts["sglang-oai"])

    def test_whole_replies_limits_and_cache_flush(self):
        status, words, record = self.bench(
            "--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2", "--gsp-prompts-per-group", "3",
            "--gsp-system-prompt-len", "32", "--gsp-question-len", "4", "--gsp-output-len", "4", "--tokenize-prompt",
            "--disable-stream", "--max-concurrency", "1", "--flush-cache", "--request-rate", "500", "--tag", "t",
        )  # fmt: skip
        self.assertEqual(status, 0, words)
        self.assertEqual((record["completed"], record["total_output_tokens"], record["tag"]), (6, 24, "t"))
        self.assertEqual(record["max_concurrent_requests"], 1)
        self.assertEqual(record["max_itl_ms"], 0.0)
        self.assertEqual(record["mean_ttft_ms"], record["mean_e2e_latency_ms"])

    def test_a_traced_run(self):
        flags = ("--dataset-name", "random", "--random-input", "4", "--random-output", "4", "--num-prompts", "2")
        status, words, _ = self.bench(*flags, "--profile")
        self.assertEqual(status, 0, words)
        (trace,) = self.traces.iterdir()
        self.assertRegex(words, f"Profiling, to {trace}\n(.|\n)*Written: {trace}\n")

    def test_failures_are_told(self):
        status, words, record = self.bench(
            "--dataset-name", "random", "--random-input", "4", "--num-prompts", "2",
            "--extra-request-body", '{"sampling_params": {"temperature": -1}}',
        )  # fmt: skip
        self.assertEqual((status, record), (2, {}))
        self.assertRegex(words, "warm-up request failed: HTTP 400: .*temperature")
        no_warm_up = ("--warmup-requests", "0", "--extra-request-body", '{"input_ids": [1]}')
        status, words, record = self.bench("--dataset-name", "random", "--random-in", "4", "--num-p", "2", *no_warm_up)
        self.assertEqual((status, record["completed"]), (1, 0))
        self.assertIn("2 of 2 requests failed", words)
        status, words, _ = self.bench("--dataset-name", "random", "--tokenizer", "/nowhere")
        self.assertEqual(status, 2)
        self.assertIn("/nowhere is not a local folder", words)

    def test_few_shot_questions(self):
        host, port = self.url.rsplit(":", 1)
        flags = ["--data-path", str(SMOKE_QUESTIONS), "--host", host, "--port", port]
        words = io.StringIO()
        with contextlib.redirect_stdout(words):
            status = few_shot_gsm8k.main([*flags, "--num-questions", "6", "--num-shots", "2", "--max-new-tokens", "4"])
        self.assertEqual(status, 0)
        self.assertRegex(
            words.getvalue(),
            r"Accuracy: \d\.\d{3}\nInvalid: \d\.\d{3}\nLatency: [\d.]+ s\nOutput throughput: [\d.]+ token/s\n",
        )


class TestFewShotParts(CustomTestCase):
    def test_numbers(self):
        for text, number in (
            ("so 3 + 4 = 7.\n#### 7", 7.0), ("1,250 coins", 1250.0), ("-3.5 degrees", -3.5), ("none", None),
        ):  # fmt: skip
            self.assertEqual(few_shot_gsm8k.parse_number(text), number)

    def test_examples_are_not_asked(self):
        pairs = few_shot_gsm8k.read_questions(str(SMOKE_QUESTIONS))
        self.assertEqual(len(pairs), 20)
        prompts = few_shot_gsm8k.make_prompts(pairs, 2, 3)
        self.assertEqual(len(prompts), 3)
        for (prompt, expected), (question, answer) in zip(prompts, pairs[2:5]):
            self.assertTrue(prompt.startswith(f"Question: {pairs[0][0]}\nAnswer: {pairs[0][1]}\n\nQuestion: "))
            self.assertTrue(prompt.endswith(f"Question: {question}\nAnswer:"))
            self.assertEqual(float(answer.rsplit("#### ", 1)[1]), expected)
        with self.assertRaisesRegex(few_shot_gsm8k.EvalError, "not enough"):
            few_shot_gsm8k.make_prompts(pairs, 20, 3)


class TestWithoutServer(CustomTestCase):
    def test_one_batch(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.jsonl"
            done = run_tool(
                "sglang.bench_one_batch", "--batch-size", "1", "3", "--input-len", "20", "--output-len", "1", "6",
                "--result-filename", str(path), "--run-name", "r", "--page-size", "8",
            )  # fmt: skip
            self.assertEqual(done.returncode, 0, done.stderr)
            records = [json.loads(line) for line in path.read_text().splitlines()]
        self.assertEqual([(r["batch_size"], r["output_len"]) for r in records], [(1, 1), (1, 6), (3, 1), (3, 6)])
        keys = "run_name batch_size input_len output_len prefill_latency prefill_throughput".split()
        decode_keys = ["median_decode_latency", "median_decode_throughput"]
        self.assertEqual(list(records[0]), [*keys, "total_latency", "overall_throughput"])
        self.assertEqual(list(records[1]), [*keys, *decode_keys, "total_latency", "overall_throughput"])
        last = records[3]
        self.assertAlmostEqual(last["prefill_throughput"], 60 / last["prefill_latency"])
        self.assertAlmostEqual(last["median_decode_throughput"], 3 / last["median_decode_latency"])
        self.assertAlmostEqual(last["overall_throughput"], 3 * 26 / last["total_latency"])
        for line in (
            "Prefill. latency: ",
            "Decode 0. Batch size: 3, latency: ",
            "Decode.  median latency: ",
            "Total. ",
        ):
            self.assertIn(f"\n{line}", done.stdout)

    def test_one_batch_with_drafts(self):
        model = str(EMBEDDED_MODELS["qwen3.5-moe-tiny"])
        flags = ("--model-path", model, "--speculative-algorithm", "NEXTN", "--speculative-num-steps", "2")
        with tempfile.TemporaryDirectory() as folder:
            path, prompts = Path(folder) / "result.jsonl", Path(folder) / "prompts.txt"
            prompts.write_text("27+58=\nrev:abcdef=\n")
            done = run_tool(
                "sglang.bench_one_batch", *flags, "--batch-size", "3", "--input-len", "20", "--output-len", "12",
                "--result-filename", str(path), "--prompt-filename", str(prompts), "--page-size", "4",
            )  # fmt: skip
            self.assertEqual(done.returncode, 0, done.stderr)
            (record,) = [json.loads(line) for line in path.read_text().splitlines()]
        self.assertGreaterEqual(record["output_len"], 12)
        self.assertTrue(1 < record["accept_length"] <= 3, record)
        self.assertIn(f"accept length: {record['accept_length']:.2f}", done.stdout)
        throughput = 3 * record["accept_length"] / record["median_decode_latency"]
        self.assertAlmostEqual(record["median_decode_throughput"], throughput)
        done = run_tool("sglang.bench_one_batch", *flags, "--correctness-test")
        self.assertEqual(done.returncode, 2)
        self.assertIn("drop --speculative-algorithm", done.stderr)

    def test_one_batch_in_one_step_and_in_two(self):
        done = run_tool("sglang.bench_one_batch", "--correctness-test", "--output-len", "4", "--page-size", "4")
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("'27+58=' -> '85", done.stdout)
        self.assertEqual(done.stdout.count("(same in two steps)"), 3)

    def test_offline_throughput(self):
        done = run_tool(
            "sglang.bench_offline_throughput", "--dataset-name", "random", "--random-input-len", "8",
            "--random-output-len", "4", "--random-range-ratio", "1", "--num-prompts", "6",
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("= Offline Throughput Benchmark Result =", done.stdout)
        self.assertRegex(done.stdout, r"Total generated tokens: +24 ")


class TestTiming(CustomTestCase):
    def test_both_clocks_give_seconds_of_one_call(self) -> None:
        calls: list[str] = []
        with mock.patch.object(timing.time, "perf_counter", side_effect=[10.0, 12.5]):
            self.assertEqual(timing.timed(lambda: calls.append("host") or 7), (7, 2.5))

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                calls.append("record")

            def synchronize(self) -> None:
                calls.append("wait")

            def elapsed_time(self, end: "Event") -> float:
                return 6000.0  # ms

        with mock.patch.object(device_time.torch.cuda, "Event", Event):
            self.assertEqual(device_time.device_seconds(lambda: calls.append("call"), 3), 2.0)
        self.assertEqual(calls, ["host", "record", "call", "call", "call", "record", "wait"])

    def test_steps_are_timed_in_one_place(self) -> None:
        files = [
            *(REPO / "benchmark").rglob("*.py"),
            *(REPO / "python/sglang").glob("bench*/*.py"),
            REPO / "python/sglang/test/device_time.py",
        ]
        self.assertGreater(len(files), 30)
        found = {path.name for path in files if ".elapsed_time(" in path.read_text(encoding="utf-8")}
        # The latter finds out how long a spinning kernel must be.
        self.assertEqual(found, {"device_time.py", "bench_overlap.py"})


if __name__ == "__main__":
    unittest.main()

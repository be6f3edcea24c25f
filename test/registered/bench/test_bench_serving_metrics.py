"""bench_serving without a server: timelines against brute force, the block, the record, prompts, arrivals, flags."""

import argparse
import asyncio
import contextlib
import io
import json
import random
import statistics
import tempfile
import unittest
import unittest.mock
from pathlib import Path

import numpy as np

from sglang.bench_serving import arrivals, base_url_of, check_arguments, make_parser
from sglang.bench_utils.clients import BenchmarkError, Chunk, Target, Timeline, read_chunk
from sglang.bench_utils.datasets import DatasetError, DatasetRow, get_dataset, random_lengths
from sglang.bench_utils.metrics import (
    RequestOutput,
    RunInfo,
    accept_length,
    calculate_metrics,
    result_block,
    result_details,
    result_record,
)
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.bench_checkpoint import write_tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer
from sglang.test.tiny_tokenizers import write_tokenizer as save_tokenizer

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")

BLOCK_LABELS = """Backend:|Traffic request rate:|Max request concurrency:|Successful requests:|Benchmark duration (s):|
Total input tokens:|Total input text tokens:|Total generated tokens:|Total generated tokens (retokenized):|
Request throughput (req/s):|Input token throughput (tok/s):|Output token throughput (tok/s):|
Peak output token throughput (tok/s):|Peak concurrent requests:|Total token throughput (tok/s):|Concurrency:|
Accept length:|
Mean E2E Latency (ms):|Median E2E Latency (ms):|P90 E2E Latency (ms):|P99 E2E Latency (ms):|
Mean TTFT (ms):|Median TTFT (ms):|P99 TTFT (ms):|
Mean TPOT (ms):|Median TPOT (ms):|P99 TPOT (ms):|
Mean ITL (ms):|Median ITL (ms):|P95 ITL (ms):|P99 ITL (ms):|Max ITL (ms):"""
SECTIONS = (
    "End-to-End Latency",
    "Time to First Token",
    "Time per Output Token (excl. 1st token)",
    "Inter-Token Latency",
)
RECORD_KEYS = """tag backend dataset_name request_rate max_concurrency sharegpt_output_len random_input_len
random_output_len random_range_ratio server_info duration completed total_input_tokens total_input_text_tokens
total_output_tokens total_output_tokens_retokenized request_throughput input_throughput output_throughput
total_throughput mean_e2e_latency_ms median_e2e_latency_ms std_e2e_latency_ms p90_e2e_latency_ms p99_e2e_latency_ms
mean_ttft_ms median_ttft_ms std_ttft_ms p99_ttft_ms mean_tpot_ms median_tpot_ms std_tpot_ms p99_tpot_ms mean_itl_ms
median_itl_ms std_itl_ms p95_itl_ms p99_itl_ms max_itl_ms concurrency accept_length max_output_tokens_per_s
max_concurrent_requests""".split()
LENGTHS = {
    "sharegpt_output_len": None,
    "random_input_len": 8,
    "random_output_len": 4,
    "random_range_ratio": 0.0,
}


class TestAcceptLength(CustomTestCase):
    def test_the_steps_of_the_run_alone_count(self):
        def states(*counts):
            return [{"spec_verify_ct": steps, "num_accepted_drafts": accepted} for steps, accepted in counts]

        self.assertEqual(accept_length(states((10, 0), (0, 0)), states((14, 6), (4, 4))), 2.25)
        self.assertEqual(accept_length([], states((4, 6))), 2.5)
        self.assertIsNone(accept_length(states((3, 1)), states((3, 1))))  # nothing was verified
        self.assertIsNone(accept_length([{}], [{}]))
        self.assertEqual(accept_length([{}], [{"avg_spec_accept_length": 2.1}]), 2.1)  # another server


def percentile(values: list[float], percent: float) -> float:
    """Linear interpolation between neighbours, written out."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def synthetic_run(seed: int = 0, count: int = 40) -> tuple[list[RequestOutput], list[list[float]]]:
    """Outputs fed through Timeline from invented chunk times, and the time of each single token."""
    rng = random.Random(seed)
    outputs, tokens = [], []
    for index in range(count):
        output = RequestOutput(prompt_len=rng.randint(1, 50), start=1000 + rng.random() * 3)
        timeline, now, times, produced = Timeline(output), output.start, [], 0
        for chunk in range(rng.choice([1, 1, 7, 20])):
            gap, size = rng.random() * 0.3, rng.choice([1, 1, 1, 3])
            # Tokens of a later chunk are spread over its gap; those of the first all come with it.
            times += [now + gap * (i + 1) / size if chunk else now + gap for i in range(size)]
            now, produced = now + gap, produced + size
            timeline.add(Chunk("x" * produced, False, produced), now)
        timeline.finish()
        if index % 10 == 9:
            output.error = "refused"
            times = []
        outputs.append(output)
        tokens.append(times)
    return outputs, tokens


def run_info(**changes) -> RunInfo:
    return RunInfo(
        **{
            "backend": "sglang",
            "dataset_name": "random",
            "request_rate": float("inf"),
            "max_concurrency": None,
            "lengths": LENGTHS,
            **changes,
        }
    )


class TestMetrics(CustomTestCase):
    def setUp(self):
        self.outputs, self.tokens = synthetic_run()
        self.duration = 6.5
        retokenized = [output.output_len + 1 for output in self.outputs]
        self.metrics = calculate_metrics(self.outputs, self.duration, retokenized)
        self.done = [(o, t) for o, t in zip(self.outputs, self.tokens) if not o.error]

    def test_counts_leave_failures_out(self):
        self.assertEqual(self.metrics.completed, 36)
        self.assertEqual(self.metrics.total_input, sum(o.prompt_len for o, _ in self.done))
        self.assertEqual(self.metrics.total_output, sum(len(times) for _, times in self.done))
        self.assertEqual(self.metrics.total_output_retokenized, self.metrics.total_output + 36)

    def test_latencies_against_token_times(self):
        ttft = [times[0] - o.start for o, times in self.done]
        e2e = [times[-1] - o.start for o, times in self.done]
        tpot = [(times[-1] - times[0]) / (len(times) - 1) for _, times in self.done if len(times) > 1]
        itl = []
        for output, times in self.done:
            first = sum(moment == times[0] for moment in times)
            itl += [b - a for a, b in zip(times[first - 1 :], times[first:])]
            self.assertEqual(len(output.itl), len(times) - first)
        for name, values in (("e2e", e2e), ("ttft", ttft), ("tpot", tpot), ("itl", itl)):
            found, ms = getattr(self.metrics, name), [1e3 * value for value in values]
            with self.subTest(name):
                self.assertAlmostEqual(found.mean, statistics.fmean(ms), places=6)
                self.assertAlmostEqual(found.median, statistics.median(ms), places=6)
                self.assertAlmostEqual(found.std, statistics.pstdev(ms), places=6)
                self.assertAlmostEqual(found.p90, percentile(ms, 90), places=6)
                self.assertAlmostEqual(found.p95, percentile(ms, 95), places=6)
                self.assertAlmostEqual(found.p99, percentile(ms, 99), places=6)
                self.assertAlmostEqual(found.max, max(ms), places=6)
        self.assertAlmostEqual(self.metrics.concurrency, sum(e2e) / self.duration)

    def test_peaks_by_brute_force(self):
        first = min(o.start for o, _ in self.done)
        moments = [moment - first for _, times in self.done for moment in times]
        per_second = [sum(second <= m < second + 1 for m in moments) for second in range(10)]
        self.assertEqual(self.metrics.max_output_tokens_per_s, max(per_second))
        spans = [(o.start, o.start + o.latency) for o, _ in self.done]
        in_flight = max(sum(a <= moment < b for a, b in spans) for moment, _ in spans)
        self.assertEqual(self.metrics.max_concurrent_requests, in_flight)

    def test_a_follower_is_not_beside_its_predecessor(self):
        outputs = [RequestOutput(1, start=float(i), ttft=0.5, latency=1.0, output_len=1) for i in range(3)]
        self.assertEqual(calculate_metrics(outputs, 3.0, [1, 1, 1]).max_concurrent_requests, 1)

    def test_nothing_succeeded(self):
        metrics = calculate_metrics([RequestOutput(5, error="no")], 0.0, [0])
        self.assertEqual((metrics.completed, metrics.total_output, metrics.concurrency), (0, 0, 0.0))
        self.assertIn("Successful requests:                     0", result_block(run_info(), metrics))

    def test_block_has_the_labels_in_order(self):
        block = result_block(run_info(accept_length=2.5, max_concurrency=4), self.metrics)
        lines = block.strip("\n").split("\n")
        self.assertEqual(lines[0], " Serving Benchmark Result ".center(50, "="))
        self.assertEqual(lines[-1], "=" * 50)
        rows = [line for line in lines[1:-1] if not line.startswith("-")]
        self.assertEqual([row[:41].rstrip() for row in rows], BLOCK_LABELS.replace("\n", "").split("|"))
        self.assertEqual([line.strip("-") for line in lines if line.startswith("-")], list(SECTIONS))
        self.assertEqual(rows[1][41:].strip(), "inf")
        self.assertEqual(rows[2][41:].strip(), "4")
        self.assertEqual(rows[4][41:].strip(), "6.50")
        self.assertEqual(rows[9][41:].strip(), f"{36 / 6.5:.2f}")
        plain = result_block(run_info(), self.metrics)
        self.assertNotIn("Accept length", plain)
        self.assertIn("Max request concurrency:                 not set", plain)

    def test_record_has_the_keys_and_is_json(self):
        record = result_record(run_info(), self.metrics)
        self.assertEqual(sorted(record), sorted(RECORD_KEYS))
        self.assertEqual(record["request_rate"], "inf")
        self.assertAlmostEqual(record["total_throughput"], record["input_throughput"] + record["output_throughput"])
        self.assertEqual(json.loads(json.dumps(record, allow_nan=False)), record)
        details = result_details(self.outputs)
        self.assertEqual(sorted(details), ["errors", "generated_texts", "input_lens", "itls", "output_lens", "ttfts"])
        self.assertTrue(all(len(values) == 40 for values in details.values()))


class TestChunks(CustomTestCase):
    def read(self, backend: str, message: dict, stream: bool = True, **changes) -> Chunk:
        return read_chunk(Target(backend, "http://x", "m", stream, **changes), message)

    def test_the_three_backends(self):
        native = {"text": "ab", "meta_info": {"completion_tokens": 2, "finish_reason": None}}
        self.assertEqual(self.read("sglang", native), Chunk("ab", False, 2))
        self.assertEqual(self.read("sglang", native, incremental=True), Chunk("ab", True, 2))
        self.assertEqual(self.read("sglang", native, stream=False, incremental=True), Chunk("ab", False, 2))
        text = {"choices": [{"text": "ab", "finish_reason": None}], "usage": {"completion_tokens": 2}}
        self.assertEqual(self.read("sglang-oai", text), Chunk("ab", True, 2))
        delta = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}], "usage": None}
        self.assertEqual(self.read("sglang-oai-chat", delta), Chunk("", True, None))
        whole = {
            "choices": [{"message": {"content": "ab"}, "finish_reason": "stop"}],
            "usage": {"completion_tokens": 3},
        }
        self.assertEqual(self.read("sglang-oai-chat", whole, stream=False), Chunk("ab", True, 3))

    def test_errors_are_raised_with_the_servers_words(self):
        aborted = {
            "text": "",
            "meta_info": {"completion_tokens": 0, "finish_reason": {"type": "abort", "message": "full"}},
        }
        flat = {"object": "error", "message": "too long", "code": 400}
        for backend, message, words in (
            ("sglang", aborted, "full"),
            ("sglang", {"error": {"message": "broken"}}, "broken"),
            ("sglang-oai", flat, "too long"),
        ):
            with self.assertRaisesRegex(BenchmarkError, words):
                self.read(backend, message)

    def test_timeline_counts_tokens_without_usage_and_ignores_empty_chunks(self):
        output = RequestOutput(3, start=10.0)
        timeline = Timeline(output)
        for now, text in ((10.1, ""), (10.5, "a"), (10.75, "b"), (11.0, "")):
            timeline.add(Chunk(text, True, None), now)
        timeline.finish()
        self.assertEqual((output.ttft, output.latency, output.output_len, output.text), (0.5, 0.75, 2, "ab"))
        self.assertEqual(output.itl, [0.25])
        empty = RequestOutput(3)
        Timeline(empty).finish()
        self.assertEqual(empty.error, "the reply contains no token")

    def test_bodies(self):
        text, ids = DatasetRow("hi", 1, 7), DatasetRow([5, 6], 2, 7)
        native = Target("sglang", "", "m", extra_body={"rid": "r"}).body(ids)
        self.assertEqual(native["input_ids"], [5, 6])
        self.assertEqual(native["sampling_params"], {"temperature": 0.0, "max_new_tokens": 7, "ignore_eos": True})
        self.assertEqual(native["rid"], "r")
        self.assertEqual(Target("sglang", "", "m").body(text)["text"], "hi")
        oai = Target("sglang-oai", "", "m", stream=False, ignore_eos=False).body(ids)
        self.assertEqual((oai["prompt"], oai["max_tokens"], oai["ignore_eos"]), ([5, 6], 7, False))
        self.assertNotIn("stream_options", oai)
        chat = Target("sglang-oai-chat", "", "m").body(text)
        self.assertEqual(chat["messages"], [{"role": "user", "content": "hi"}])
        self.assertEqual(chat["max_completion_tokens"], 7)
        self.assertTrue(chat["stream_options"]["include_usage"])


class TestDatasets(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        root = Path(cls.folder)
        (root / "plain").mkdir()
        write_tokenizer(root / "plain", 512)
        save_tokenizer(str(root / "bos"), byte_level_tokenizer())
        cls.tokenizers = {name: Tokenizer.from_path(str(root / name)) for name in ("plain", "bos")}
        cls.sharegpt = root / "sharegpt.json"
        entries = [
            {"conversations": [{"value": f"question {i} " * (i + 1)}, {"value": "yes " * (i + 2)}]} for i in range(9)
        ]
        entries += [{"conversations": [{"value": "alone"}]}, {"conversations": [{"value": "x"}, {"value": "y"}]}]
        cls.sharegpt.write_text(json.dumps(entries), encoding="utf-8")
        cls.custom = root / "custom.jsonl"
        lines = [{"prompt": f"do {i}", "output_len": i + 1} for i in range(4)]
        lines += [{"conversation": [{"content": "hello"}, {"content": "world"}]}]
        cls.custom.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")

    def rows(self, *flags: str, tokenizer: str = "plain") -> list[DatasetRow]:
        with contextlib.redirect_stdout(io.StringIO()):
            return get_dataset(make_parser().parse_args(list(flags)), self.tokenizers[tokenizer])

    def test_random_prompts_have_the_promised_lengths(self):
        flags = ("--dataset-name", "random-ids", "--num-prompts", "60", "--random-input-len", "40",
                 "--random-output-len", "9", "--random-range-ratio", "0.5")  # fmt: skip
        for name, tokenizer in self.tokenizers.items():
            with self.subTest(name):
                rows = self.rows(*flags, tokenizer=name)
                self.assertEqual([row.prompt_len for row in rows], [len(tokenizer.encode(row.prompt)) for row in rows])
                self.assertLessEqual({row.prompt_len for row in rows}, set(range(20, 41)))
                self.assertGreater(len({row.prompt_len for row in rows}), 5)
                self.assertEqual({row.output_len for row in rows}, set(range(4, 10)))
        fixed = self.rows(*flags[:-1], "1.0")
        self.assertEqual({(row.prompt_len, row.output_len) for row in fixed}, {(40, 9)})
        ids = self.rows(*flags, "--tokenize-prompt")
        self.assertTrue(all(len(row.prompt) == row.prompt_len for row in ids))
        special = self.tokenizers["plain"].all_special_ids
        self.assertFalse(special & {token for row in ids for token in row.prompt})

    def test_the_seed_decides(self):
        for flags in (
            ("--dataset-name", "random-ids", "--random-input-len", "16", "--num-prompts", "8"),
            ("--dataset-name", "sharegpt", "--dataset-path", str(self.sharegpt), "--num-prompts", "8"),
            ("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "2", "--gsp-prompts-per-group", "4",
             "--gsp-system-prompt-len", "8", "--gsp-question-len", "4"),
        ):  # fmt: skip
            with self.subTest(flags[1]):
                self.assertEqual(self.rows(*flags), self.rows(*flags))
                self.assertNotEqual(self.rows(*flags), self.rows(*flags, "--seed", "2"))

    def test_shared_prefixes(self):
        flags = ("--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "3", "--gsp-prompts-per-group", "5",
                 "--gsp-system-prompt-len", "20", "--gsp-question-len", "6", "--gsp-output-len", "7")  # fmt: skip
        rows = self.rows(*flags, "--tokenize-prompt")
        groups: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
        for row in rows:
            self.assertEqual((row.prompt_len, len(row.prompt), row.output_len), (26, 26, 7))
            groups.setdefault(tuple(row.prompt[:20]), set()).add(tuple(row.prompt[20:]))
        self.assertEqual([len(questions) for questions in groups.values()], [5, 5, 5])
        texts = self.rows(*flags)
        self.assertEqual(len({row.prompt.split("\n\n")[0] for row in texts}), 3)
        encode = self.tokenizers["plain"].encode
        self.assertTrue(all(row.prompt_len == len(encode(row.prompt)) for row in texts))

    def test_files(self):
        encode = self.tokenizers["plain"].encode
        rows = self.rows("--dataset-name", "sharegpt", "--dataset-path", str(self.sharegpt), "--num-prompts", "50")
        self.assertEqual(len(rows), 9)  # one has a single turn, one is too short
        self.assertTrue(all(row.prompt_len == len(encode(row.prompt)) for row in rows))
        self.assertEqual(
            sorted(row.output_len for row in rows), sorted(len(encode("yes " * (i + 2))) for i in range(9))
        )
        limit = ("--sharegpt-context-len", "80", "--sharegpt-output-len", "3")
        short = self.rows("--dataset-name", "sharegpt", "--dataset-path", str(self.sharegpt), *limit)
        self.assertTrue(all(row.prompt_len + 3 <= 80 and row.output_len == 3 for row in short))
        self.assertLess(len(short), 9)
        custom = self.rows("--dataset-name", "custom", "--dataset-path", str(self.custom))
        self.assertEqual({row.prompt: row.output_len for row in custom if row.prompt.startswith("do")},
                         {f"do {i}": i + 1 for i in range(4)})  # fmt: skip
        random_rows = self.rows("--dataset-name", "random", "--dataset-path", str(self.sharegpt), "--num-prompts", "4",
                                "--random-input-len", "30", "--random-range-ratio", "1")  # fmt: skip
        self.assertEqual([row.prompt_len for row in random_rows], [30] * 4)
        self.assertTrue(all(row.prompt.startswith(("question", "x", "alone")) for row in random_rows))

    def test_what_cannot_be_made_is_said(self):
        empty = Path(self.folder) / "empty.jsonl"
        empty.write_text('{"other": 1}\n', encoding="utf-8")
        for flags, words in (
            (("--dataset-name", "sharegpt"), "nothing is downloaded"),
            (("--dataset-name", "mmmu"), "known from upstream but not implemented"),
            (("--dataset-name", "custom", "--dataset-path", "/nowhere.jsonl"), "cannot be read"),
            (("--dataset-name", "custom", "--dataset-path", str(empty)), "no usable entry"),
            (("--dataset-name", "random", "--random-range-ratio", "1.5"), r"in \[0, 1\]"),
            (("--dataset-name", "random", "--num-prompts", "0"), "at least 1"),
        ):
            with self.subTest(flags), self.assertRaisesRegex(DatasetError, words):
                self.rows(*flags)

    def test_lengths_reach_both_ends(self):
        lengths = random_lengths(np.random.default_rng(0), 4, 0.5, 500)
        self.assertEqual(set(lengths), {2, 3, 4})
        self.assertEqual(set(random_lengths(np.random.default_rng(0), 3, 0.0, 500)), {1, 2, 3})


class TestCommandLine(CustomTestCase):
    def refuse(self, *flags: str) -> str:
        parser, words = make_parser(), io.StringIO()
        with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(words):
            check_arguments(parser, parser.parse_args(list(flags)))
        self.assertEqual(caught.exception.code, 2)
        return words.getvalue()

    def test_abbreviations_and_defaults(self):
        args = make_parser().parse_args(["--random-input", "128", "--random-output", "64", "--num-prompt", "5"])
        self.assertEqual((args.random_input_len, args.random_output_len, args.num_prompts), (128, 64, 5))
        self.assertEqual((args.backend, args.dataset_name, args.warmup_requests), ("sglang", "sharegpt", 1))
        self.assertEqual(base_url_of(args), "http://127.0.0.1:30000")
        self.assertEqual(base_url_of(argparse.Namespace(base_url="http://a:1/", host="", port=0)), "http://a:1")

    def test_refusals_name_the_flag(self):
        for flags, words in (
            (("--backend", "vllm"), "--backend vllm is known from upstream but not implemented"),
            (("--profile-by-stage",), "--profile-by-stage is known from upstream but not implemented"),
            (("--lora-name", "a"), "--lora-name is known from upstream"),
            (("--request-rate", "0"), "--request-rate must be above 0"),
            (("--max-concurrency", "0"), "--max-concurrency must be at least 1"),
            (("--backend", "sglang-oai-chat", "--tokenize-prompt"), "chat messages are text"),
            (("--header", "novalue"), "NAME=VALUE"),
            (("--extra-request-body", "[1]"), "JSON object"),
        ):
            with self.subTest(flags):
                self.assertIn(words, self.refuse(*flags))

    def test_arrivals_are_poisson_and_do_not_wait_after_the_last(self):
        rows = [DatasetRow("x", 1, 1)] * 400

        async def collect(rate: float) -> list[float]:
            clock = FakeClock()
            with clock.installed():
                return [clock.now async for _ in arrivals(rows, rate, np.random.default_rng(0))]

        times = asyncio.run(collect(50.0))
        gaps = np.diff(times)
        self.assertEqual(times[0], 0.0)
        self.assertAlmostEqual(float(gaps.mean()), 1 / 50, delta=0.003)
        self.assertAlmostEqual(float(gaps.std()), 1 / 50, delta=0.004)  # of an exponential: its mean
        self.assertEqual(set(asyncio.run(collect(float("inf")))), {0.0})


class FakeClock:
    """A clock that only sleeping advances."""

    now = 0.0

    def installed(self) -> contextlib.ExitStack:
        async def sleep(seconds: float) -> None:
            self.now += seconds

        stack = contextlib.ExitStack()
        stack.enter_context(unittest.mock.patch("sglang.bench_serving.asyncio.sleep", sleep))
        stack.enter_context(unittest.mock.patch("sglang.bench_serving.time.perf_counter", lambda: self.now))
        return stack


if __name__ == "__main__":
    unittest.main()

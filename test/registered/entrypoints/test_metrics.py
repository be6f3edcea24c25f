"""/metrics against counts by hand, read by prometheus_client's own parser; labels, formats, several schedulers."""

import random
import unittest
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sglang.srt.managers.io_struct import FinishReason
from sglang.srt.managers.request_metrics import Histogram, RequestMetrics, RequestTimer
from sglang.test import scheduler_fakes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServer, FakeServerTestCase
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=7, suite="stage-a-test-cpu")

ODD_NAME = 'a "quoted" \\\\ \\name\n'
TIMES = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "queue_time_seconds",
)


def read(text):
    """Samples by name and distinguishing labels."""
    told = ("le", "dp_rank", "position")
    return {
        (sample.name.removeprefix("sglang:"), *(sample.labels[key] for key in told if key in sample.labels)): sample
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class TestPage(FakeServerTestCase):
    settings = {"enable_metrics": True, "served_model_name": ODD_NAME}

    def page(self):
        return {key: sample.value for key, sample in read(self.client.get("/metrics").text).items()}

    def test_equal_to_a_count_by_hand(self):
        chance = random.Random(1)
        before = self.page()
        lengths = [chance.randint(1, 9) for _ in range(500)]

        def ask(number):
            params = {"max_new_tokens": lengths[number], "n": 1 + (number % 5 == 0)}
            body = {"text": "abc", "sampling_params": params, "stream": number % 2 == 0}
            reply = self.client.post("/generate", json=body)
            self.assertEqual(reply.status_code, 200, reply.text)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(ask, range(500)))
        after = self.page()
        counts = {key: after[key] - before.get(key, 0) for key in after}
        sequences = [length for number, length in enumerate(lengths) for _ in range(1 + (number % 5 == 0))]
        self.assertEqual(counts[("num_requests_total",)], len(sequences))
        for name in TIMES:
            if "queue" in name:  # the fake scheduler says that a request has started at about the time it ends
                self.assertGreater(counts[(f"{name}_count",)], len(sequences) / 2)
                continue
            want = sum(sequences) - len(sequences) if "inter" in name else len(sequences)
            self.assertEqual(counts[(f"{name}_count",)], want, name)
            self.assertEqual(counts[(f"{name}_bucket", "+Inf")], want, name)
        spent = counts[("e2e_request_latency_seconds_sum",)]
        parts = counts[("time_to_first_token_seconds_sum",)] + counts[("inter_token_latency_seconds_sum",)]
        self.assertLess(abs(spent - parts), 0.05 * spent + 0.05)

    def test_what_is_aborted_has_no_end(self):
        before = self.page()
        self.fake.scheduler.error = FinishReason(type="abort", message="no", status_code=500)
        self.assertEqual(self.generate(text="abc").status_code, 500)
        after = self.page()
        self.assertEqual(after[("num_requests_total",)] - before[("num_requests_total",)], 1)
        key = ("e2e_request_latency_seconds_count",)
        self.assertEqual(after[key], before[key])

    def test_formats_and_labels(self):
        self.generate(text="abc", sampling_params={"max_new_tokens": 2})
        plain = self.client.get("/metrics")
        self.assertTrue(plain.headers["content-type"].startswith("text/plain"))
        other = self.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        self.assertEqual(other.headers["content-type"], plain.headers["content-type"])
        self.assertEqual(plain.text.count("# TYPE sglang:"), plain.text.count("# HELP "))
        for family in text_string_to_metric_families(plain.text):
            plain_kind = "counter" if family.samples[0].name.endswith("_total") else "gauge"
            want = "histogram" if family.name.removeprefix("sglang:") in TIMES else plain_kind
            self.assertEqual((family.type, family.documentation != ""), (want, True), family.name)
        self.assertIn("\n# TYPE sglang:num_requests_total counter\nsglang:num_requests_total{", plain.text)
        samples = read(plain.text)
        for sample in samples.values():
            self.assertEqual(sample.labels["model_name"], ODD_NAME)
            self.assertEqual((sample.labels["engine_type"], sample.labels["tp_rank"]), ("unified", "0"))
            self.assertNotIn("dp_rank", sample.labels)

    def test_the_schedulers_own(self):
        state = {
            "num_used_tokens": 5, "max_total_num_tokens": 20, "num_running_reqs": 3, "num_grammar_queue_reqs": 2,
            "cache_hit_rate": 0.5, "num_prompt_tokens": 40, "spec_accept_rate_by_position": [0.75, 0.5],
            "streams": {"trace": [{"site": "moe", "num_tokens": 8, "captured": True, "overlap_fraction": 0.25}]},
        }  # fmt: skip
        manager = self.fake.context.manager
        for states in ([state], [state, {**state, "num_running_reqs": 4}]):
            metrics = [RequestMetrics() for _ in states]
            metrics[-1].queue.add(0.02)
            with (
                mock.patch.object(manager, "get_internal_states", mock.AsyncMock(return_value=states)),
                mock.patch.object(manager, "request_metrics", metrics),
            ):
                found = self.page()
            last = (str(len(states) - 1),) if len(states) > 1 else ()
            self.assertEqual(found[("token_usage", *last)], 0.25)
            self.assertNotIn(("swa_token_usage", *last), found)
            self.assertEqual(found[("cache_hit_rate", *last)], 0.5)
            self.assertEqual(found[("num_grammar_queue_reqs", *last)], 2)
            self.assertEqual(found[("prompt_tokens_total", *last)], 40)
            self.assertEqual(found[("num_running_reqs", *last)], 2 + len(states))
            self.assertEqual(found[("spec_accept_rate_by_position", *last, "2")], 0.5)
            self.assertEqual(found[("queue_time_seconds_bucket", "0.025", *last)], 1)
            self.assertEqual(found[("queue_time_seconds_bucket", "0.01", *last)], 0)
            self.assertEqual(found[("stream_overlap_share", *(("0",) if last else ()))], 0.25)

    def test_a_window_with_pools_of_its_own(self):
        state = {
            "num_used_tokens": 5, "max_total_num_tokens": 20, "num_used_swa_tokens": 3, "swa_max_total_num_tokens": 4,
        }  # fmt: skip
        manager = self.fake.context.manager
        with mock.patch.object(manager, "get_internal_states", mock.AsyncMock(return_value=[state])):
            found = self.page()
        usage = {name: found[(name,)] for name in ("token_usage", "full_token_usage", "swa_token_usage")}
        self.assertEqual(usage, {"token_usage": 0.25, "full_token_usage": 0.25, "swa_token_usage": 0.75})

    def test_not_without_the_flag(self):
        fake = FakeServer().wait_ready()
        self.addCleanup(fake.stop)
        self.assertEqual(httpx.get(f"{fake.url}/metrics").status_code, 404)
        body = {"text": "abc", "sampling_params": {"max_new_tokens": 3}}
        self.assertEqual(httpx.post(f"{fake.url}/generate", json=body).status_code, 200)
        counted = fake.context.manager.request_metrics[0]
        self.assertEqual((counted.num_requests, counted.first_token.sum), (0, 0.0))


class TestTimes(CustomTestCase):
    def test_histogram(self):
        chance = random.Random(3)
        values = [
            chance.choice((0.0, 0.001, 0.0025, 1.0, 500.0, 501.0, 10 ** chance.uniform(-4, 3))) for _ in range(500)
        ]
        histogram = Histogram()
        for value in values:
            histogram.add(value)
        histogram.add(0.3, 4)
        values += [0.3] * 4
        for bound, count in histogram.cumulative():
            self.assertEqual(count, sum(value <= float(bound) for value in values), bound)
        self.assertAlmostEqual(histogram.sum, sum(values))

    def times(self, *messages, created=10.0):
        """Sums and counts for messages (time, new tokens, first token at, reason)."""
        metrics = RequestMetrics()
        timer = RequestTimer(metrics, created)
        for now, num_new, first, reason in messages:
            end = None if reason is None else FinishReason(type=reason)
            output = SimpleNamespace(output_ids=[5] * num_new, first_token_at=first, finish_reason=end)
            with mock.patch("sglang.srt.managers.request_metrics.time.perf_counter", return_value=now):
                timer.received(output)
        kinds = (metrics.first_token, metrics.inter_token, metrics.end_to_end)
        return [(round(kind.sum, 9), kind.cumulative()[-1][1]) for kind in kinds]

    def test_the_queue_ends_when_the_scheduler_says(self):
        metrics = RequestMetrics()
        RequestTimer(metrics, 10.0).started(10.5)
        with mock.patch("sglang.srt.managers.request_metrics.time.perf_counter", return_value=11.0):
            RequestTimer(metrics, 10.0).started(None)
        self.assertEqual((metrics.queue.sum, metrics.queue.cumulative()[-1][1]), (1.5, 2))

    def test_streams_and_wholes(self):
        streamed = self.times((11.0, 1, 10.9, None), (12.0, 2, None, None), (12.5, 1, None, "length"))
        self.assertEqual(streamed, [(1.0, 1), (1.5, 3), (2.5, 1)])
        self.assertEqual(self.times((14.0, 5, 11.0, "stop")), [(1.0, 1), (3.0, 4), (4.0, 1)])
        self.assertEqual(self.times((14.0, 5, None, "stop")), [(4.0, 1), (0.0, 4), (4.0, 1)])
        self.assertEqual(self.times((11.0, 0, None, "length")), [(0.0, 0), (0.0, 0), (1.0, 1)])
        self.assertEqual(self.times((11.0, 0, None, "abort")), [(0.0, 0)] * 3)

    def test_the_scheduler_says_once_when_the_first_token_was_there(self):
        setup = scheduler_fakes.make()
        for rid, stream in (("whole", False), ("stream", True)):
            setup.channel.inbox.append(scheduler_fakes.request(rid, [5, 6, 7], max_new=4, stream=stream))
        outputs = []
        setup.channel.to_detokenizer = lambda message: outputs.extend(message.outputs)
        setup.run()
        said = {"whole": [], "stream": []}
        for output in outputs:
            said[output.rid].append(output.first_token_at)
        self.assertEqual(len(said["whole"]), 1)
        self.assertGreater(said["whole"][0], 0)
        self.assertEqual([time is not None for time in said["stream"]], [True] + [False] * (len(said["stream"]) - 1))


if __name__ == "__main__":
    unittest.main()

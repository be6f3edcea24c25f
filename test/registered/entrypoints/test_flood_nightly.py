"""2,000 requests at once: cheap refusals with a time to retry, and flat memory; admitted requests stay fast."""

import asyncio
import json
import math
import resource
import time
import unittest
from urllib.parse import urlsplit

import psutil

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_tree import kill_process_tree
from sglang.test.test_utils import CustomTestCase, free_url, popen_launch_server

register_cpu_ci(est_time=120, suite="nightly-cpu", nightly=True)

QUEUE, RUNNING, FLOOD = 200, 32, 2000
BODY = json.dumps({"input_ids": [5] * 200, "sampling_params": {"max_new_tokens": 8, "ignore_eos": True}}).encode()


async def _send(host, port):
    """Status, headers and seconds of one request on a connection of its own."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY)
    answer = await reader.read()
    writer.close()
    top = answer.partition(b"\r\n\r\n")[0].decode("latin-1").lower().split("\r\n")
    return int(top[0].split()[1]), dict(line.split(": ", 1) for line in top[1:]), time.perf_counter() - began


def _percentile(seconds, share):
    return sorted(seconds)[math.ceil(share * len(seconds)) - 1]


class TestFlood(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
        url = free_url()
        limits = ["--max-queued-requests", QUEUE, "--max-running-requests", RUNNING, "--disable-radix-cache"]
        cls.process = popen_launch_server(None, url, other_args=limits)
        cls.address = urlsplit(url).hostname, urlsplit(url).port
        cls.main = psutil.Process(cls.process.pid)

    @classmethod
    def tearDownClass(cls):
        kill_process_tree(cls.process.pid)

    def send(self, count):
        """Replies to ``count`` requests at once, and the CPU seconds that the HTTP process took."""

        async def all_at_once():
            return await asyncio.gather(*(_send(*self.address) for _ in range(count)))

        before = sum(self.main.cpu_times()[:2])
        answers = asyncio.run(all_at_once())
        return answers, sum(self.main.cpu_times()[:2]) - before

    def test_flood(self):
        self.send(QUEUE)  # everything is warm
        at_bound, cpu_bound_s = self.send(QUEUE)
        self.assertEqual({status for status, _, _ in at_bound}, {200})
        memory = self.main.memory_info().rss
        answers, cpu_s = self.send(FLOOD)
        growth_mb = (self.main.memory_info().rss - memory) / 2**20
        admitted = [seconds for status, _, seconds in answers if status == 200]
        refused = [(headers, seconds) for status, headers, seconds in answers if status == 503]
        self.assertEqual(len(admitted) + len(refused), FLOOD)
        self.assertGreaterEqual(len(admitted), QUEUE)
        self.assertGreater(len(refused), FLOOD // 2)
        for headers, _ in refused:
            self.assertTrue(1 <= int(headers["retry-after"]) <= 60)
        cpu_ms = 1000 * (cpu_s - cpu_bound_s * len(admitted) / QUEUE) / len(refused)
        p99, p99_at_bound = _percentile(admitted, 0.99), _percentile([seconds for _, _, seconds in at_bound], 0.99)
        print(
            f"admitted {len(admitted)}, p99 {p99:.2f} s (at the bound {p99_at_bound:.2f} s); refused {len(refused)}, "
            f"p50 {_percentile([seconds for _, seconds in refused], 0.5):.2f} s, {cpu_ms:.2f} ms of server CPU each; "
            f"main process {growth_mb:+.1f} MB"
        )
        self.assertLess(cpu_ms, 5)
        self.assertLess(growth_mb, 100)
        # What was let in as places came free waited no longer than a full queue takes.
        self.assertLess(p99, 2 * p99_at_bound + 1)


if __name__ == "__main__":
    unittest.main()

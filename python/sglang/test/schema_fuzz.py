"""Requests that schemathesis makes of a server's own OpenAPI document, valid and invalid ones, and what came back."""

from __future__ import annotations

import collections
import subprocess
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from schemathesis import GenerationMode
from schemathesis.core.result import Ok

from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server

# A request that waits longer counts as one that hangs.
TIMEOUT_S = 60.0
# Cases of an operation without a body, half of them invalid where it has parameters.
_MAX_WITHOUT_BODY = 10


class SchemaFuzzTestCase(CustomTestCase):
    """A server of the embedded model; a short context bounds what a request without a limit of its own may cost."""

    url: str
    process: subprocess.Popen[Any]

    @classmethod
    def setUpClass(cls) -> None:
        cls.url = free_url()
        cls.process = popen_launch_server(None, cls.url, other_args=("--context-length", "64"))

    @classmethod
    def tearDownClass(cls) -> None:
        kill_process_tree(cls.process.pid)
        cls.process.wait()

    def check(self, num_cases: int, seed: int) -> None:
        """No 500, no hang, and a healthy server afterwards."""
        statuses = fuzz(self.url, num_cases, seed)
        print(f"seed {seed}: {dict(sorted(statuses.items()))}")
        self.assertGreater(sum(statuses.values()), 0.8 * num_cases)
        # Neither all refused nor all accepted: both kinds were tested.
        self.assertGreater(statuses[200], 0.1 * num_cases)
        self.assertGreater(statuses[400], 0.1 * num_cases)
        body = {"text": "27+58=", "sampling_params": {"temperature": 0}}
        reply = httpx.post(f"{self.url}/generate", json=body, timeout=TIMEOUT_S, trust_env=False)
        self.assertEqual(reply.json()["text"], "85")
        self.assertIsNone(self.process.poll())


def fuzz(url: str, num_cases: int, seed: int) -> collections.Counter[int]:
    """Send about ``num_cases`` requests to the server at ``url``; returns how often each status came.

    Raises AssertionError for a status of 500 or more, naming the request, and httpx.TimeoutException for a hang.
    """
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = []
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operations.append(result.ok())
    with_body = [operation for operation in operations if operation.body]
    others = [operation for operation in operations if not operation.body]
    statuses: collections.Counter[int] = collections.Counter()
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as client:
        for operation in others:
            _send_cases(client, operation, _MAX_WITHOUT_BODY // 2, seed, statuses)
        each = (num_cases - sum(statuses.values())) // (2 * len(with_body))
        for operation in with_body:
            _send_cases(client, operation, each, seed, statuses)
    return statuses


def _send_cases(client: httpx.Client, operation: Any, each: int, seed: int, statuses: collections.Counter[int]) -> None:
    """``each`` valid and as many invalid requests."""
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue

        @with_seed(seed)
        @settings(
            max_examples=each,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            request = case.as_transport_kwargs()
            reply = client.request(
                request["method"],
                request["url"],
                params=request.get("params"),
                headers={name: str(value) for name, value in (request.get("headers") or {}).items()},
                json=request.get("json"),
            )
            statuses[reply.status_code] += 1
            assert reply.status_code < 500, f"{case.as_curl_command()}: {reply.status_code} {reply.text[:500]}"

        send()

"""Keys and closed administrative endpoints: the policy as a table, and over HTTP."""

import unittest

import httpx

from sglang.srt.entrypoints.auth import ADMIN_PATHS, AuthPolicy
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServer
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")


class TestKeys(CustomTestCase):
    """Who has access, as a table: (host, api key, admin key) and the status for no key, the api key, the admin key."""

    TABLE = [
        ("127.0.0.1", None, None, "inference", (None, None, None)),
        ("127.0.0.1", None, None, "admin", (None, None, None)),
        ("localhost", None, None, "admin", (None, None, None)),
        ("::1", None, None, "admin", (None, None, None)),
        ("127.0.0.1", "k", None, "inference", (401, None, 401)),
        ("127.0.0.1", "k", None, "admin", (401, None, 401)),
        ("127.0.0.1", None, "a", "inference", (None, None, None)),
        ("127.0.0.1", None, "a", "admin", (401, 401, None)),
        ("127.0.0.1", "k", "a", "inference", (401, None, 401)),
        ("127.0.0.1", "k", "a", "admin", (401, 401, None)),
        ("0.0.0.0", None, None, "inference", (None, None, None)),
        ("0.0.0.0", None, None, "admin", (403, 403, 403)),
        ("10.1.2.3", None, None, "admin", (403, 403, 403)),
        ("::", None, None, "admin", (403, 403, 403)),
        ("example.org", None, None, "admin", (403, 403, 403)),
        ("0.0.0.0", "k", None, "admin", (401, None, 401)),
        ("0.0.0.0", None, "a", "admin", (401, 401, None)),
    ]

    def status(self, policy, path, key, method="POST"):
        refusal = policy.refusal(method, path, f"Bearer {key}".encode() if key else b"")
        return refusal and refusal.status_code

    def test_table(self):
        for host, api, admin, kind, expected in self.TABLE:
            policy = AuthPolicy(host, api, admin)
            for path in ADMIN_PATHS if kind == "admin" else ("/generate", "/v1/models", "/server_info"):
                got = tuple(self.status(policy, path, key) for key in (None, "k", "a"))
                self.assertEqual(got, expected, (host, api, admin, path))

    def test_probes_are_open_and_keys_are_exact(self):
        policy = AuthPolicy("0.0.0.0", "k", "a")
        for path in ("/health", "/health_generate", "/ready", "/metrics"):
            self.assertIsNone(self.status(policy, path, None, "GET"))
        self.assertIsNone(self.status(policy, "/generate", None, "OPTIONS"))
        for path in ("/healthz", "/metrics2", "/health/x", "/readyness"):
            self.assertEqual(self.status(policy, path, None, "GET"), 401, path)
        for header in (b"k", b"Bearer", b"Bearer kk", b"Basic k", b"Bearer \xe9", b"bearer  ", b"Bearer k\xff"):
            self.assertEqual(policy.refusal("POST", "/generate", header).status_code, 401, header)
        self.assertIsNone(policy.refusal("POST", "/generate", b"bearer k"))
        self.assertEqual(self.status(policy, "/flush_cache/", "k"), 401)

    def test_keys_beyond_ascii(self):
        policy = AuthPolicy("0.0.0.0", "schlüssel", "ключ")
        for key in ("schlüssel".encode(), "schlüssel".encode("latin-1")):
            self.assertIsNone(policy.refusal("POST", "/generate", b"Bearer " + key))
        self.assertIsNone(policy.refusal("POST", "/flush_cache", "Bearer ключ".encode()))
        self.assertEqual(policy.refusal("POST", "/generate", b"Bearer schl?ssel").status_code, 401)

    def test_what_the_server_lacks_is_said_whatever_the_key(self):
        for policy in (AuthPolicy("0.0.0.0", "k", "a"), AuthPolicy("0.0.0.0", None, None)):
            for path in ("/encode", "/update_weights_from_disk", "/v1/embeddings"):
                self.assertEqual([self.status(policy, path, key) for key in (None, "k", "a")], [None] * 3, path)

    def test_over_http(self):
        fake = FakeServer(host="0.0.0.0").wait_ready()
        self.addCleanup(fake.stop)
        self.assertEqual(httpx.post(f"{fake.url}/generate", json={"text": "a"}, timeout=60).status_code, 200)
        closed = httpx.post(f"{fake.url}/flush_cache", timeout=60)
        self.assertEqual(closed.status_code, 403)
        self.assertIn("--api-key", closed.json()["error"]["message"])
        self.assertEqual(httpx.get(f"{fake.url}/health", timeout=60).status_code, 200)

    def test_401_over_http(self):
        fake = FakeServer(api_key="k").wait_ready()
        self.addCleanup(fake.stop)
        refused = httpx.post(f"{fake.url}/generate", json={"text": "a"}, timeout=60)
        self.assertEqual((refused.status_code, refused.json()["code"]), (401, 401))
        self.assertIn("Authorization: Bearer", refused.json()["error"]["message"])
        headers = {"authorization": "Bearer k"}
        self.assertEqual(
            httpx.post(f"{fake.url}/generate", json={"text": "a"}, headers=headers, timeout=60).status_code, 200
        )


if __name__ == "__main__":
    unittest.main()

"""Host names and web pages: which are accepted, as a table, and over HTTP with pre-flights."""

import unittest

import httpx

from sglang.srt.entrypoints.sites import SitePolicy
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServer
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


def passes(policy, method="POST", path="/generate", **headers):
    raw = {name.replace("_", "-").encode(): value.encode("latin-1") for name, value in headers.items()}
    return policy.refusal(method, path, raw) is None


class TestHosts(CustomTestCase):
    LOOPBACK = ("localhost", "localhost:30000", "LocalHost.", "127.0.0.1:1", "127.9.9.9", "[::1]:30000")
    OTHERS = ("evil.example", "evil.example:30000", "127.0.0.1.evil.example", "localhost.evil", "[::2]", "10.0.0.1",
              "[::1", "localhost@evil", "0.0.0.0", "x\u00e9\x1b")  # fmt: skip

    def test_which_binds_answer_loopback_names_only(self):
        for bind, key, hosts, answers_others in (
            ("127.0.0.1", False, None, False),
            ("localhost", False, None, False),
            ("::1", False, None, False),
            ("127.0.0.1", True, None, True),
            ("0.0.0.0", False, None, True),
            ("10.0.0.1", False, None, True),
            ("127.0.0.1", False, "*", True),
            ("0.0.0.0", False, "good.example", False),
            ("127.0.0.1", True, "good.example", False),
        ):
            policy = SitePolicy(bind, key, hosts, None)
            for host in self.LOOPBACK:
                self.assertTrue(passes(policy, host=host), (bind, host))
            for host in self.OTHERS:
                for method in ("GET", "POST", "OPTIONS"):
                    self.assertEqual(passes(policy, method, host=host), answers_others, (bind, host))
            self.assertEqual(passes(policy, host="good.example:80"), answers_others or hosts is not None)
            self.assertTrue(passes(policy))  # HTTP/1.0
            self.assertTrue(passes(policy, "GET", "/health", host="10.9.8.7"))

    def test_the_refusal_names_the_flag_and_escapes_the_name(self):
        policy = SitePolicy("127.0.0.1", False, None, None)
        text = policy.refusal("GET", "/v1/models", {b"host": b"evil\x1b\xe9" + b"x" * 9000}).body.decode()
        self.assertIn("--allowed-hosts", text)
        self.assertNotIn("\x1b", text)
        self.assertLess(len(text), 1000)


class TestPages(CustomTestCase):
    CHANGING = (
        ("POST", "/generate"), ("PUT", "/generate"), ("POST", "/abort_request"), ("POST", "/flush_cache"),
        ("GET", "/flush_cache"), ("GET", "/flush_cache/"),
    )  # fmt: skip

    def test_what_changes_state_is_refused_to_pages_of_other_sites(self):
        policy = SitePolicy("127.0.0.1", False, None, "https://ui.example, http://localhost:3000/")
        host = "localhost:30000"
        for headers, expected in (
            ({}, True),  # no browser
            ({"origin": "http://localhost:30000"}, True),
            ({"sec_fetch_site": "same-origin"}, True),
            ({"sec_fetch_site": "none"}, True),  # typed by the user
            ({"origin": "https://ui.example", "sec_fetch_site": "cross-site"}, True),
            ({"origin": "http://localhost:3000", "sec_fetch_site": "same-site"}, True),
            ({"origin": "http://localhost:3001", "sec_fetch_site": "same-site"}, False),
            ({"origin": "http://evil.example"}, False),
            ({"origin": "null"}, False),
            ({"sec_fetch_site": "cross-site"}, False),
            ({"sec_fetch_site": "same-site"}, False),
            ({"origin": "http://evil.example", "sec_fetch_site": "same-origin"}, False),
        ):
            for method, path in self.CHANGING:
                self.assertEqual(passes(policy, method, path, host=host, **headers), expected, (headers, path))
            self.assertTrue(passes(policy, "GET", "/v1/models", host=host, **headers))
        everyone = SitePolicy("127.0.0.1", False, None, "*")
        self.assertTrue(passes(everyone, host=host, origin="http://any.example", sec_fetch_site="cross-site"))


class TestOverHttp(CustomTestCase):
    def serve(self, **settings):
        fake = FakeServer(**settings).wait_ready()
        self.addCleanup(fake.stop)
        return fake

    def test_rebinding_and_cross_site_requests(self):
        fake = self.serve()
        for path in ("/model_info", "/flush_cache", "/v1/models", "/no/such"):
            reply = httpx.get(fake.url + path, headers={"host": "evil.example"}, timeout=60)
            self.assertEqual((reply.status_code, reply.json()["error"]["type"]), (403, "PermissionDeniedError"), path)
        self.assertEqual(httpx.get(f"{fake.url}/health", headers={"host": "evil.example"}, timeout=60).status_code, 200)
        page = {"origin": "http://evil.example"}
        self.assertEqual(httpx.get(f"{fake.url}/flush_cache", headers=page, timeout=60).status_code, 403)
        self.assertEqual(httpx.get(f"{fake.url}/flush_cache", timeout=60).status_code, 200)

    def test_cors_also_with_a_key(self):
        fake = self.serve(api_key="k", allowed_origins="https://ui.example")
        asks = {"origin": "https://ui.example", "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type"}  # fmt: skip
        reply = httpx.options(f"{fake.url}/v1/chat/completions", headers=asks, timeout=60)
        self.assertEqual(reply.status_code, 200, reply.text)
        self.assertEqual(reply.headers["access-control-allow-origin"], "https://ui.example")
        self.assertIn("authorization", reply.headers["access-control-allow-headers"].lower())
        self.assertEqual(
            httpx.options(f"{fake.url}/generate", headers={**asks, "origin": "http://x"}, timeout=60).status_code, 400
        )
        call = {"origin": "https://ui.example"}
        for headers, status in ((call, 401), ({**call, "authorization": "Bearer k"}, 200)):
            reply = httpx.post(f"{fake.url}/generate", json={"text": "a"}, headers=headers, timeout=60)
            self.assertEqual(reply.status_code, status)
            self.assertEqual(reply.headers["access-control-allow-origin"], "https://ui.example")

    def test_no_cors_unasked(self):
        fake = self.serve()
        reply = httpx.get(f"{fake.url}/v1/models", headers={"origin": "https://ui.example"}, timeout=60)
        self.assertNotIn("access-control-allow-origin", reply.headers)


if __name__ == "__main__":
    unittest.main()

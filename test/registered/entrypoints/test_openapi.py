"""The server's description of its API: the OpenAPI document, its page, and the first page."""

import re
import unittest

import httpx

from sglang.srt.entrypoints.unsupported import UNSUPPORTED_PATHS
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServerTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


class TestDocument(FakeServerTestCase):
    settings = {"enable_metrics": True, "served_model_name": "tiny"}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.document = cls.client.get("/openapi.json").json()
        cls.operations = {
            (method, path): operation
            for path, item in cls.document["paths"].items()
            for method, operation in item.items()
        }

    def resolve(self, schema):
        while "$ref" in schema:
            schema = self.document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        return schema

    def test_each_operation_says_what_it_takes_and_gives(self):
        self.assertTrue(self.document["openapi"].startswith("3.1"))
        for (method, path), operation in self.operations.items():
            takes = method in ("post", "put") and path not in ("/flush_cache", "/stop_profile")
            self.assertEqual("requestBody" in operation, takes, path)
            self.assertGreater(len(operation["summary"]), 8, path)
            self.assertEqual(set(operation["responses"]), {"200", "default"})
            names = {p["name"] for p in operation.get("parameters", ()) if p["in"] == "path"}
            self.assertEqual(names, set(re.findall(r"{([^}]*)}", path)))
            self.assertNotIn(":", path)
        ids = [operation["operationId"] for operation in self.operations.values()]
        self.assertEqual(len(ids), len(set(ids)))
        body = self.operations["post", "/v1/chat/completions"]["requestBody"]["content"]["application/json"]["schema"]
        fields = self.resolve(body)
        self.assertEqual(fields["required"], ["messages"])
        self.assertIn({"type": "integer"}, fields["properties"]["max_tokens"]["anyOf"])
        generate = self.operations["post", "/generate"]["requestBody"]["content"]["application/json"]["schema"]
        params = self.resolve(self.resolve(generate)["properties"]["sampling_params"]["anyOf"][0])
        self.assertIn({"type": "string"}, params["properties"]["stop"]["anyOf"])

    def test_every_reference_leads_somewhere(self):
        found = set(re.findall(r'"#/components/schemas/([^"]+)"', self.client.get("/openapi.json").text))
        self.assertEqual(found - self.document["components"]["schemas"].keys(), set())
        self.assertFalse([name for name in self.document["components"]["schemas"] if name.endswith("_")])

    def test_it_lists_what_is_served_and_nothing_else(self):
        routes = {route.path for route in self.fake.server.config.app.routes}
        described = {path for _, path in self.operations}
        described |= {"/v1/models/{model:path}", "/", "/docs", "/openapi.json", *UNSUPPORTED_PATHS}
        self.assertEqual(routes, described - {"/v1/models/{model}"})
        for (method, path), operation in self.operations.items():
            if "requestBody" not in operation and not path.endswith("_profile"):
                reply = self.client.request(method, path.replace("{model}", "tiny"))
                self.assertEqual(reply.status_code, 200, path)
                wanted = "application/json" if "content" in operation["responses"]["200"] else ""
                self.assertTrue(reply.headers.get("content-type", "").startswith(wanted), path)

    def test_the_page_needs_nothing_from_elsewhere(self):
        page = self.client.get("/docs")
        self.assertTrue(page.headers["content-type"].startswith("text/html"))
        self.assertEqual(re.findall(r"https?://|//cdn|src=|@import", page.text), [])
        self.assertIn('fetch("openapi.json")', page.text)

    def test_the_first_page_says_where_to_go(self):
        about = self.client.get("/").json()
        self.assertEqual((about["model"], about["status"]), ("tiny", "up"))
        for name in ("models", "health", "docs", "openapi"):
            self.assertEqual(self.client.get(about["paths"][name]).status_code, 200)

    def test_head_where_get_is_and_only_where_nothing_changes(self):
        for path in ("/", "/docs", "/openapi.json", "/health", "/v1/models", "/model_info"):
            reply = self.client.head(path)
            self.assertEqual((reply.status_code, reply.content), (200, b""), path)
        self.fake.scheduler.received.clear()
        self.assertEqual(self.client.head("/flush_cache").status_code, 405)
        self.assertEqual(self.fake.scheduler.received, [])


class TestKey(FakeServerTestCase):
    settings = {"api_key": "k"}

    def test_the_document_says_that_a_key_is_needed(self):
        with httpx.Client(base_url=self.fake.url, headers={"authorization": "Bearer k"}) as client:
            document = client.get("/openapi.json").json()
        self.assertEqual(document["components"]["securitySchemes"]["key"]["scheme"], "bearer")
        self.assertNotIn("/metrics", document["paths"])


if __name__ == "__main__":
    unittest.main()

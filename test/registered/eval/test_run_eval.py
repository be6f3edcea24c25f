"""`run_eval` against servers whose answers are known: what it asks, what it prints, when it fails."""

import contextlib
import http.server
import io
import json
import threading
import unittest
from collections.abc import Callable
from unittest import mock

from sglang.embedded_models import default_model_path
from sglang.srt.utils.common import get_free_port
from sglang.test import run_eval
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import answer, heldout_questions

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")


class ScriptedServer:
    """Answers `/generate` and `/v1/chat/completions` with `reply(question)`, and keeps what it was sent."""

    def __init__(self, reply: Callable[[str], str], status: int = 200):
        self.requests: list[tuple[str, str | None, dict]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append((self.path, self.headers.get("Authorization"), body))
                chat = self.path == "/v1/chat/completions"
                text = reply(body["messages"][-1]["content"] if chat else body["text"])
                payload = {"choices": [{"message": {"content": text}}]} if chat else {"text": text}
                data = json.dumps(payload).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            request_queue_size = 128  # every thread of an evaluation connects at once

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "ScriptedServer":
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def run(*argv: str) -> tuple[int, str]:
    """Exit code and everything printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = run_eval.main(argv)
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, printed.getvalue()


def wrong_on(count: int, task: str) -> Callable[[str], str]:
    """Right answers except the first `count` held-out questions of `task`."""
    missed = [question.text for question in heldout_questions(100) if question.task == task][:count]
    return lambda text: answer(text) + "0" if text in missed else answer(text)


class TestScore(CustomTestCase):
    def test_a_server_that_is_right_passes_through_both_apis(self):
        for api, path in (("generate", "/generate"), ("chat", "/v1/chat/completions")):
            with self.subTest(api=api), ScriptedServer(answer) as server:
                code, printed = run("--base-url", server.url + "/", "--num-examples", "100", "--api", api)
                self.assertEqual(code, 0, printed)
                self.assertIn("Score: 1.000", printed)
                self.assertRegex(printed, r"addition +25 / 25 +exact match 1\.000")
                self.assertEqual({request[0] for request in server.requests}, {path})
                self.assertEqual(len(server.requests), 100)

    def test_it_asks_greedily_and_sends_the_key(self):
        with ScriptedServer(answer) as server:
            run("--base-url", server.url, "--num-examples", "1", "--api-key", "secret")
            run("--base-url", server.url, "--num-examples", "1", "--api", "chat")
        (_, key, generate), (_, no_key, chat) = server.requests
        self.assertEqual((key, no_key), ("Bearer secret", None))
        self.assertEqual(generate["sampling_params"]["temperature"], 0)
        self.assertEqual(chat["temperature"], 0)

    def test_the_gate_is_on_addition_and_lookup(self):
        for task, count, expected in (
            ("addition", 1, 0),
            ("addition", 2, 1),
            ("lookup", 2, 1),
            ("sort", 25, 0),
            ("reverse", 25, 0),
        ):
            with self.subTest(task=task, wrong=count), ScriptedServer(wrong_on(count, task)) as server:
                code, printed = run("--base-url", server.url, "--num-examples", "100")
                self.assertEqual(code, expected, printed)
                self.assertIn(f"Score: {1 - count / 100:.3f}", printed)
                if expected:
                    self.assertIn(f"FAILED: {task} scored 0.920, below --min-score 0.95", printed)

    def test_a_stricter_bar_fails_what_passed(self):
        with ScriptedServer(wrong_on(1, "addition")) as server:
            code, _ = run("--base-url", server.url, "--num-examples", "100", "--min-score", "1.0")
        self.assertEqual(code, 1)


class TestTrouble(CustomTestCase):
    def test_a_server_that_answers_an_error(self):
        with ScriptedServer(answer, status=503) as server:
            code, printed = run("--base-url", server.url, "--num-examples", "3")
        self.assertEqual(code, 1)
        self.assertIn("/generate answered 503", printed)

    def test_no_server(self):
        port = get_free_port()
        code, printed = run("--port", str(port), "--num-examples", "3")
        self.assertEqual(code, 1)
        self.assertIn(f"POST http://127.0.0.1:{port}/generate failed", printed)
        self.assertIn("is the server up", printed)

    def test_command_lines_that_make_no_sense(self):
        for argv, message in (
            (["--eval-name", "mmlu"], "--eval-name mmlu: not here; the evaluations are tiny, far"),
            (["--reference", "transformers"], "needs --model-path"),
            (["--compare"], "--compare needs --reference"),
            (["--num-examples", "0"], "at least 1"),
            (["--min-score", "95"], "between 0 and 1"),
        ):
            with self.subTest(argv=argv):
                code, printed = run(*argv)
                self.assertEqual(code, 2)
                self.assertIn(message, printed)


class TestReference(CustomTestCase):
    def test_transformers_passes_the_gate_on_the_default_checkpoint(self):
        path = str(default_model_path())
        with ScriptedServer(answer) as server:
            reference = ("--reference", "transformers", "--model-path", path, "--num-examples", "24", "--compare")
            code, printed = run("--base-url", server.url, *reference)
        self.assertEqual(code, 0, printed)
        self.assertIn(f"transformers {path} (generate):", printed)
        self.assertRegex(printed, r"Difference: [012] questions")

    def test_scores_that_differ_by_three_questions_fail(self):
        for count, expected in ((2, 0), (3, 1)):
            with (
                ScriptedServer(wrong_on(count, "sort")) as server,
                mock.patch.object(run_eval, "transformers_answers", lambda _, asked, api: [q.answer for q in asked]),
            ):
                reference = ("--reference", "transformers", "--model-path", "-", "--num-examples", "100", "--compare")
                code, printed = run("--base-url", server.url, *reference)
            self.assertEqual(code, expected, printed)
            self.assertIn(f"Difference: {count} questions ({count} answers differ)", printed)

    def test_without_compare_no_server_is_asked(self):
        with mock.patch.object(run_eval, "transformers_answers", lambda _, asked, api: [""] * len(asked)):
            code, printed = run("--reference", "transformers", "--model-path", "-", "--num-examples", "8")
        self.assertEqual(code, 1)
        self.assertIn("FAILED: transformers: addition scored 0.000", printed)


if __name__ == "__main__":
    unittest.main()

"""The server as a user starts it: real processes over dummy weights, and their end."""

import contextlib
import io
import json
import signal
import tempfile
import threading
import time
import unittest
from pathlib import Path

import httpx
import psutil

from sglang.cli.killall import is_server
from sglang.cli.main import main as cli_main
from sglang.cli.main import serve_arguments
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kill_matrix import Cell
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server
from sglang.test.tiny_checkpoints import TINY_CONFIGS
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer
from sglang.version import __version__

register_cpu_ci(est_time=50, suite="stage-b-test-cpu")

DUMMY = ["--load-format", "dummy", "--max-total-tokens", "4096", "--random-seed", "1"]
LONG = {"text": "hello", "sampling_params": {"max_new_tokens": 2000, "temperature": 0, "ignore_eos": True}}


def write_model(folder):
    """A model folder for dummy weights: configuration and tokenizer."""
    config = {**TINY_CONFIGS["dsv3"], "architectures": ["DeepseekV3ForCausalLM"]}
    Path(folder, "config.json").write_text(json.dumps(config))
    return write_tokenizer(folder, byte_level_tokenizer())


class TestRunningServer(CustomTestCase):
    def setUp(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        self.url = free_url()
        self.process = popen_launch_server(write_model(folder), self.url, other_args=DUMMY)
        self.addCleanup(kill_process_tree, self.process.pid)
        self.children = psutil.Process(self.process.pid).children()

    def post_in_background(self, body):
        replies = []
        thread = threading.Thread(
            target=lambda: replies.append(httpx.post(f"{self.url}/generate", json=body, timeout=60))
        )
        thread.start()
        deadline = time.monotonic() + 60
        while httpx.get(f"{self.url}/get_load", timeout=60).json()[0]["num_reqs"] == 0:
            self.assertLess(time.monotonic(), deadline)
        return thread, replies

    def test_serves_and_stops_on_sigterm_after_what_is_in_flight(self):
        body = {"text": "hello", "sampling_params": {"max_new_tokens": 5, "temperature": 0}}
        first, second = (httpx.post(f"{self.url}/generate", json=body, timeout=60).json() for _ in range(2))
        self.assertEqual(first["output_ids"], second["output_ids"])
        self.assertGreater(second["meta_info"]["cached_tokens"], 0)
        info = httpx.get(f"{self.url}/server_info", timeout=60).json()
        self.assertEqual(info["unpickled_while_serving"], 0)
        self.assertEqual(info["internal_states"][0]["unpickled_while_serving"], 0)
        self.assertEqual((info["max_total_num_tokens"], info["page_size"]), (4096, 1))
        self.assertTrue(info["kernels"])
        self.assertEqual(len(self.children), 2)
        self.assertTrue(all(is_server(child.cmdline()) for child in self.children))
        short = {**LONG, "sampling_params": {**LONG["sampling_params"], "max_new_tokens": 100}}
        thread, replies = self.post_in_background(short)
        self.process.send_signal(signal.SIGTERM)
        thread.join(60)
        self.assertEqual(len(replies[0].json()["output_ids"]), 100)
        self.assertEqual(self.process.wait(60), 0)
        _, alive = psutil.wait_procs(self.children, timeout=60)
        self.assertEqual(alive, [])
        log = self.process.log_path.read_text()
        self.assertIn("The server is fired up and ready to roll!", log)
        self.assertRegex(log, r"scheduler\] platform: \w+")
        self.assertNotIn("Traceback", log)


class TestSignals(CustomTestCase):
    """A few cells of the matrix of test_kill_matrix.py."""

    def test_cells(self):
        for cell in (
            Cell("main", signal.SIGKILL, "streaming"),
            Cell("scheduler", signal.SIGSTOP, "queued"),
            Cell("detokenizer", signal.SIGINT, "idle"),
        ):
            with self.subTest(cell.name):
                print(cell.run())


class TestCli(CustomTestCase):
    def test_serve_takes_a_model_by_position(self):
        self.assertEqual(serve_arguments(["m", "--tp", "2"]), ["--model-path", "m", "--tp", "2"])
        self.assertEqual(serve_arguments(["--model-path", "m"]), ["--model-path", "m"])

    def test_unknown_subcommands(self):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            for words in ([], ["serv"], ["generate"]):
                self.assertEqual(cli_main(words), 2)
            for words in (["version"], ["--version"]):
                self.assertEqual(cli_main(words), 0)
        self.assertEqual(out.getvalue().count(f"sglang-amd {__version__}"), 2)
        self.assertIn("unknown subcommand 'serv'", err.getvalue())

    def test_which_processes_killall_ends(self):
        self.assertTrue(is_server(["python", "-m", "sglang.launch_server", "--tp", "2"]))
        self.assertTrue(is_server(["/venv/bin/python", "/venv/bin/sglang", "serve", "m"]))
        for other in (["vim", "sglang.py"], ["python", "-m", "sglang.bench_serving"], ["grep", "sglang"], []):
            self.assertFalse(is_server(other))


if __name__ == "__main__":
    unittest.main()

"""Programs that evaluate, measure and route, as their users start them, against a server (extra ``clients``)."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

import httpx

from sglang.embedded_models import default_model_path
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=180, suite="nightly-cpu", nightly=True)

ROOT = Path(__file__).resolve().parents[3]
OPENAI_NODE = "openai@6.49.0"
ADDITIONS = [question for question in heldout_questions(80) if question.text.endswith("=") and "+" in question.text]
# A task of its own, since nothing is fetched: greedy answers, and the likelier of two.
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {data}}}
test_split: train
output_type: {kind}
doc_to_text: "{{{{question}}}}"
{more}
"""
GENERATED = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
doc_to_target: right
doc_to_choice: "{{choices}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def has(package: str):
    """Skips a test where its program is not installed: the summary counts it, and a skip is not a pass."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return unittest.skip(f"{package} is not installed: pip install .[clients]")
    return lambda test: test


class TestPrograms(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        cls.folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        cls.url = free_url()
        server = popen_launch_server(None, cls.url)
        cls.addClassCleanup(lambda: (kill_process_tree(server.pid), server.wait()))

    def run_program(self, *command: str, timeout: float = 400, **variables: str) -> str:
        """Output of a program that must succeed, without downloads and without files in HOME."""
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HOME": str(self.folder), "OPENAI_API_KEY": "k"}
        done = subprocess.run(
            command, cwd=self.folder, env={**os.environ, **offline, **variables}, timeout=timeout, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.assertEqual(done.returncode, 0, done.stdout[-4000:])
        return done.stdout

    @has("lm_eval")
    def test_lm_eval(self) -> None:
        data = self.folder / "additions.json"
        rows = []
        for number, question in enumerate(ADDITIONS):
            choices = [question.answer, str(int(question.answer) + 1)][:: (1, -1)[number % 2]]
            rows.append({"question": question.text, "answer": question.answer, "right": number % 2, "choices": choices})
        data.write_text("\n".join(map(json.dumps, rows)))
        tasks = self.folder / "tasks"
        tasks.mkdir()
        for name, kind, more in (("said", "generate_until", GENERATED), ("chosen", "multiple_choice", CHOSEN)):
            (tasks / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, data=data, more=more))
        settings = (
            f"model=default,tokenizer={default_model_path()},num_concurrent=4,max_retries=1,base_url={self.url}/v1"
        )
        for model, path, names, extra in (
            ("local-completions", "/completions", "said,chosen", ()),
            ("local-chat-completions", "/chat/completions", "said", ("--apply_chat_template",)),
        ):
            out = self.folder / model
            self.run_program(
                sys.executable, "-m", "lm_eval", "--model", model, "--model_args", settings + path, "--tasks", names,
                "--include_path", str(tasks), "--output_path", str(out), *extra,
            )  # fmt: skip
            (found,) = out.rglob("results_*.json")
            results = json.loads(found.read_text())["results"]
            scores = [results["said"]["exact_match,none"]] + [results[n]["acc,none"] for n in results if n == "chosen"]
            self.assertEqual(len(scores), len(names.split(",")))
            for score in scores:
                self.assertGreaterEqual(score, 0.95)

    @has("aiperf")
    def test_aiperf(self) -> None:
        tokenizer = str(default_model_path())
        self.run_program(
            sys.executable, "-m", "aiperf", "profile", "--model", "default", "--url", self.url, "--endpoint-type",
            "chat", "--streaming",
            "--concurrency", "2", "--request-count", "8", "--tokenizer", tokenizer, "--isl", "32", "--osl", "8",
            "--artifact-dir", str(self.folder / "aiperf"), HF_HUB_OFFLINE="",
        )  # fmt: skip
        (found,) = (self.folder / "aiperf").rglob("*aiperf.json")
        result = json.loads(found.read_text())
        self.assertEqual(result["request_count"]["avg"], 8)
        self.assertGreater(result["time_to_first_token"]["avg"], 0)

    @has("sglang-router")
    def test_router(self) -> None:
        url = free_url()
        port = url.rpartition(":")[2]
        router = subprocess.Popen(
            [sys.executable, "-m", "sglang_router.launch_router", "--worker-urls", self.url, "--port", port,
             "--host", "127.0.0.1", "--policy", "cache_aware"],
            stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.addCleanup(lambda: (kill_process_tree(router.pid), router.wait()))
        body = {"model": "default", "messages": [{"role": "user", "content": "27+58="}], "temperature": 0}
        with httpx.Client(base_url=url, timeout=30, trust_env=False) as client:
            deadline = time.monotonic() + 60
            while True:
                self.assertIsNone(router.poll(), "the router ended")
                self.assertLess(time.monotonic(), deadline, "the router does not serve")
                try:
                    answer = client.post("/v1/chat/completions", json=body)
                except httpx.TransportError:
                    answer = None
                if answer is not None and answer.status_code == 200:
                    break
                time.sleep(0.5)
            self.assertEqual(answer.json()["choices"][0]["message"]["content"], "85")
            with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as stream:
                lines = [line for line in stream.iter_lines() if line.startswith("data: ")]
        self.assertEqual(lines[-1], "data: [DONE]")
        deltas = [json.loads(line[6:])["choices"][0]["delta"].get("content") or "" for line in lines[:-1]]
        self.assertEqual("".join(deltas), "85")

    @unittest.skipUnless(shutil.which("npm"), "npm is not installed")
    def test_openai_for_node(self) -> None:
        self.run_program("npm", "install", "--silent", "--prefix", str(self.folder / "node"), OPENAI_NODE)
        script = shutil.copy(ROOT / "scripts" / "ci" / "openai_node.mjs", self.folder / "node")
        self.assertIn("all as expected", self.run_program("node", script, self.url))


if __name__ == "__main__":
    unittest.main()

"""Pages on basic usage: each command runs on a small model, or names its needs; the dashboard has real metrics."""

import json
import re
import shlex
import subprocess
import sys
import unittest
from pathlib import Path

from sglang.srt.arg_groups.parse import read
from sglang.srt.entrypoints.metrics import described
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server

register_cpu_ci(est_time=25, suite="stage-b-test-cpu")

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted((ROOT / "docs/basic_usage").glob("*.md"))
# What stands before a block: "run", with what is printed, or "needs", with what.
BLOCK = re.compile(r"(?:^<!-- (run|needs)(?:: (.*?))? -->\n)?^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    """Page, kind, text of the mark, and commands."""
    return [(page.name, *found) for page in PAGES for found in BLOCK.findall(page.read_text())]


class TestCommands(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.url = free_url()
        cls.process = popen_launch_server(None, cls.url, other_args=["--enable-metrics"])
        cls.addClassCleanup(kill_process_tree, cls.process.pid)

    def test_each_command_that_can_be_run(self):
        for page, kind, wanted, text in blocks():
            if kind == "run":
                text = re.sub("^python ", f"{sys.executable} ", text, flags=re.MULTILINE)
                text = text.replace("http://127.0.0.1:30000", self.url)
                done = subprocess.run(["bash", "-ec", text], capture_output=True, text=True, timeout=120)
                self.assertEqual(done.returncode, 0, (page, text, done.stderr))
                self.assertIn(wanted, done.stdout, (page, text))


class TestPages(CustomTestCase):
    def test_each_command_is_marked(self):
        found = blocks()
        self.assertEqual([block for block in found if not block[1]], [])
        self.assertEqual([block for block in found if block[1] == "needs" and not block[2]], [])
        self.assertEqual({kind for _, kind, *_ in found}, {"run", "needs"})

    def test_flags_of_launches_exist(self):
        launches = [text for *_, text in blocks() if "sglang.launch_server" in text]
        self.assertTrue(launches)
        for text in launches:
            words = shlex.split(text.replace("\\\n", " "))
            flags = words[words.index("sglang.launch_server") + 1 :]
            self.assertEqual(read(flags).errors, [], text)

    def test_links_lead_somewhere(self):
        for page in PAGES:
            for link in re.findall(r"\]\(([^)#:]+)", page.read_text()):
                self.assertTrue((page.parent / link).exists(), (page.name, link))


class TestBoard(CustomTestCase):
    def setUp(self):
        self.board = json.loads((ROOT / "docs/basic_usage/grafana.json").read_text())

    def test_every_query_names_a_metric_that_exists(self):
        names = set()
        for name, kind, _ in described():
            names |= {f"{name}{end}" for end in ("_bucket", "_sum", "_count")} if kind == "histogram" else {name}
        queries = [target["expr"] for panel in self.board["panels"] for target in panel["targets"]]
        queries += [entry["query"] for entry in self.board["templating"]["list"] if entry["type"] == "query"]
        self.assertGreater(len(queries), 15)
        for query in queries:
            used = re.findall(r"sglang:\w+", query)
            self.assertTrue(used, query)
            self.assertLessEqual(set(used), names, query)
            counters = re.findall(r"(?:rate|increase)\((sglang:\w+)", query)
            self.assertTrue(all(name.endswith(("_total", "_bucket")) for name in counters), query)

    def test_panels_do_not_overlap(self):
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in self.board["panels"]]
        self.assertEqual(len(set(places)), len(places))


if __name__ == "__main__":
    unittest.main()

"""The recipes of images: instructions that exist, sources that are there, pinned bases, torch left alone."""

import fnmatch
import json
import re
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")

ROOT = Path(__file__).resolve().parents[3]
INSTRUCTIONS = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "ENV", "EXPOSE", "HEALTHCHECK", "USER", "ENTRYPOINT", "CMD"}


def read(path):
    """Instructions and their text, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines]


class TestDockerfiles(CustomTestCase):
    def setUp(self):
        self.files = {path.name: read(path) for path in sorted((ROOT / "docker").glob("*.Dockerfile"))}
        self.assertEqual(set(self.files), {"cpu.Dockerfile", "rocm.Dockerfile"})

    def texts(self, name, instruction):
        return [text for kind, text in self.files[name] if kind == instruction]

    def test_form(self):
        for name, lines in self.files.items():
            self.assertLessEqual({kind for kind, _ in lines}, INSTRUCTIONS, name)
            for instruction in ("FROM", "HEALTHCHECK", "ENTRYPOINT", "EXPOSE"):
                self.assertEqual(len(self.texts(name, instruction)), 1, (name, instruction))
            (entry,) = self.texts(name, "ENTRYPOINT")
            self.assertEqual(json.loads(entry)[:3], ["python3", "-m", "sglang.launch_server"])
            (health,) = self.texts(name, "HEALTHCHECK")
            code = json.loads(health.partition("CMD ")[2])[2]
            compile(code, name, "exec")
            self.assertIn(f":{self.texts(name, 'EXPOSE')[0]}/health", code)
            for run in self.texts(name, "RUN"):
                self.assertNotRegex(run, r"curl|wget|apt-get|sudo", name)
                self.assertTrue(all("--no-cache-dir" in part for part in run.split("&&") if "pip install" in part))

    def test_bases_are_pinned(self):
        for name in self.files:
            bases = [text.partition("=")[2] for text in self.texts(name, "ARG")] + self.texts(name, "FROM")
            for base in bases:
                if not base.startswith("$"):
                    self.assertRegex(base, r"^[\w./-]+:[\w.-]*\d", name)
                    self.assertNotIn("latest", base)

    def test_sources_are_there_and_sent_to_the_build(self):
        sent = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] not in "#*"]
        for name in self.files:
            copied = {part for text in self.texts(name, "COPY") for part in text.split()[:-1]}
            for source in copied:
                self.assertTrue((ROOT / source).exists(), source)
                self.assertTrue(any(fnmatch.fnmatch(source, line.removeprefix("!")) for line in sent), source)
            self.assertLessEqual({"README.md", "LICENSE", "pyproject.toml", "python"}, copied)

    def test_the_image_keeps_its_torch(self):
        (run,) = self.texts("rocm.Dockerfile", "RUN")
        self.assertNotRegex(run, r"index-url|--upgrade|install[^&]*\b(torch|triton)\b")
        self.assertIn("--constraint", run)
        self.assertIn("torch.version.hip", run)

    def test_the_cpu_image_takes_the_torch_that_the_package_asks_for(self):
        (wanted,) = re.findall(r'^ *"(torch.*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        self.assertIn(f"whl/cpu '{wanted}'", self.texts("cpu.Dockerfile", "RUN")[0])


if __name__ == "__main__":
    unittest.main()

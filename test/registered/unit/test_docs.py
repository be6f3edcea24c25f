"""Pages: links lead somewhere, launches that they show are accepted, and each measurement is among the current ones."""

import re
import shlex
import unittest
from collections.abc import Iterator
from pathlib import Path

from sglang.srt.arg_groups.parse import read
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(path for folder in ("docs", "benchmark") for path in (ROOT / folder).rglob("*.md"))]
)
# Up to the end of the command: a quote, a comment, a pipe, a bracket.
LAUNCH = re.compile(r"(?:sglang\.launch_server|sglang serve|scripts/serve\.sh)((?: +[^\s`|&;#)]+)+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def launches() -> Iterator[tuple[str, list[str]]]:
    """(page, words behind the command) of each launch that stands in a page or an image, templates left out."""
    for page in [*PAGES, *(ROOT / "docker").iterdir()]:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for found in LAUNCH.findall(text):
            words = shlex.split(found)
            if not any("..." in word or word in ("FLAGS", "--config") for word in words):
                yield page.name, words


class TestLinks(CustomTestCase):
    def test_each_leads_to_a_file_and_a_heading(self):
        self.assertGreater(len(PAGES), 15)
        wrong = []
        for page in PAGES:
            for link in LINK.findall(page.read_text(encoding="utf-8")):
                if re.match(r"[a-z]+:", link):
                    continue
                name, _, anchor = link.partition("#")
                target = page.parent / name if name else page
                if not target.exists() or (anchor and anchor not in anchors(target)):
                    wrong.append(f"{page.relative_to(ROOT)}: {link}")
        self.assertEqual(wrong, [])


class TestCommandLines(CustomTestCase):
    def test_each_launch_that_a_page_shows_is_accepted(self):
        shown = list(launches())
        self.assertGreater(len(shown), 7)
        wrong = [f"{page}: {' '.join(words)}: {errors}" for page, words in shown if (errors := read(words).errors)]
        self.assertEqual(wrong, [])


class TestTour(CustomTestCase):
    def test_it_is_one_page_and_leads_to_every_note(self):
        page = ROOT / "docs/developer_guide/architecture.md"
        text = page.read_text(encoding="utf-8")
        self.assertLess(text.count("\n"), 80)
        notes = {f"notes/{path.name}" for path in (page.parent / "notes").glob("*.md")}
        self.assertEqual(notes - set(LINK.findall(text)), set())


class TestResults(CustomTestCase):
    def test_each_file_is_of_a_device_and_a_date_and_is_among_the_current_figures(self):
        folder = ROOT / "benchmark/results"
        files = {path.name for path in folder.glob("*.md")} - {"README.md"}
        self.assertEqual([name for name in files if not re.match(r"[a-z0-9]+-\d{4}-\d\d-\d\d(-\w+)?\.md$", name)], [])
        linked = set(LINK.findall((folder / "README.md").read_text(encoding="utf-8")))
        self.assertEqual(files - linked, set())


if __name__ == "__main__":
    unittest.main()

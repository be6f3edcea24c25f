"""Pages: plain words, links that lead somewhere, launches that are accepted, and current measurements."""

import ast
import re
import shlex
import unittest
from collections.abc import Iterator
from pathlib import Path

from sglang.srt.arg_groups.parse import read
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

ROOT = Path(__file__).resolve().parents[3]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(path for folder in ("docs", "benchmark") for path in (ROOT / folder).rglob("*.md"))]
)
# Up to the end of the command: a quote, a comment, a pipe, a bracket.
LAUNCH = re.compile(r"(?:sglang\.launch_server|sglang serve|scripts/serve\.sh)((?: +[^\s`|&;#)]+)+)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMENT = re.compile(r"(?:^|\s)# (.+)$")
# Words that readers stumble over, with what to write.
UNCLEAR = {
    r"\bbeside\b": "next to, in addition to, or overlapping",
    r"\bof theirs\b": "their",
    r"\bwhoever\b": "anyone who, or the caller that",
    r"\b(?:ms|us|ns|milliseconds|launches) an? (?:token|step|layer|launch|request)\b": "per",
    r"\banew\b": "again",
    r"\bmend(?:s|ed|ing)?\b": "fix, repair",
    r"\blikewise\b": "also, in the same way",
    r"\bat hand\b": "local, available, current",
    r"\bbut for\b": "except",
    r"\b(?:can|could|cannot|to) be had\b": "is available, is missing",
    r"\bgives? way\b": "is replaced by",
    r"\b(?:goes|go|going|went) on\b": "continue",
    r"\blies?\b": "is, are",
    r"\b(?:asked|judged) of\b": "sent to, read from",
    r"\bguess(?:es|ed)?\b(?= of token| (?:is|are|was|were) accepted| accepted)": "draft token",
    r"\bdrawn (?:drafts?|accept|tokens?|ids?)\b": "sampled",
    r"\b(?:drafts?|tokens?|rows?|steps?|pages?|ends?|prompts?|answers?|layers?) behind (?:the|an?|it|each)\b": "after",
    r"\b(?:one|once) (?:\w+ )?an? (?:step|(?:DP )?rank|request|row|token|layer|launch|group)(?=[.,:;)]|$)": "per",
}
ANY_UNCLEAR = re.compile("|".join(UNCLEAR), re.IGNORECASE)


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


def prose() -> Iterator[tuple[str, str]]:
    """(place, line) of pages without their code, and of docstrings and comments, Triton bodies left out."""
    for page in PAGES:
        text = re.sub(r"(?s)```.*?```", lambda code: "\n" * code[0].count("\n"), page.read_text(encoding="utf-8"))
        yield from ((f"{page.name}:{number}", line) for number, line in enumerate(text.splitlines(), 1))
    for path in (
        path for folder in ("python", "test", "benchmark", "scripts") for path in (ROOT / folder).rglob("*.py")
    ):
        if path.stem.endswith("_triton") or path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.splitlines(), 1):
            if comment := COMMENT.search(line):
                yield f"{path.name}:{number}", comment[1]
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from ((path.name, line) for line in (ast.get_docstring(node) or "").splitlines())


class TestWords(CustomTestCase):
    def test_pages_docstrings_and_comments_use_plain_words(self):
        lines = list(prose())
        self.assertGreater(len(lines), 10000)
        unclear = [(place, line) for place, line in lines if ANY_UNCLEAR.search(line)]
        for pattern, better in UNCLEAR.items():
            with self.subTest(pattern):
                found = [f"{place}: {line}" for place, line in unclear if re.search(pattern, line, re.IGNORECASE)]
                self.assertEqual(found, [], f"write instead: {better}")

    def test_a_planted_word_is_found(self):
        planted = (
            "One copy a step.", "it runs beside it", "a rule of theirs", "whoever waits", "computed anew",
            "a rule mends it", "the GPU at hand", "all but for one", "none can be had", "the others go on",
            "rows lie there", "a drawn token", "drafts behind the answer",
        )  # fmt: skip
        for line in planted:
            self.assertTrue(ANY_UNCLEAR.search(line), line)
        for line in ("once a step has run", "one token of a request", "besides the others", "left behind", "a list"):
            self.assertFalse(ANY_UNCLEAR.search(line), line)


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

    def test_each_test_file_that_contributing_names_is_there(self):
        table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("### Which file to run")[2]
        names = re.findall(r"`(\w+/test_\w+\.py)`", table)
        self.assertGreater(len(names), 15)
        self.assertEqual([name for name in names if not (ROOT / "test/registered" / name).is_file()], [])


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

"""Thought and answer: the same for every way in which a reply is cut."""

import itertools
import random
import unittest

from sglang.srt.parser.reasoning_parser import ReasoningParser, continues_thought, opens_thought
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

# Where the reply begins (see ReasoningParser), the reply, its thought and its answer.
REPLIES = (
    (True, "First, 27+58.\n</think>\n\n85", "First, 27+58.", "85"),
    (True, "<think>\nopened twice\n</think>\n\n85", "opened twice", "85"),
    (True, "\n\n</think>\n\nno thought", "", "no thought"),
    (True, "</think>", "", ""),
    (True, "cut off by the  limit  \n", "cut off by the  limit", ""),
    (True, "a < b </thin k> </ think>\n c</think>d", "a < b </thin k> </ think>\n c", "d"),
    (True, "cut inside the mark </thi", "cut inside the mark </thi", ""),
    (True, "x <think> y</think> z", "x <think> y", "z"),
    (None, "\n<think>\nnaïve 你好\n</think>\n\nYes 😀\n ", "naïve 你好", "Yes 😀\n "),
    (None, "<think></think>", "", ""),
    (None, "  plain, with <think>late</think> marks ", "", "  plain, with <think>late</think> marks "),
    (None, " \n", "", " \n"),
    (None, "<thin", "", "<thin"),
    (None, "<think>never ended", "never ended", ""),
    (False, "<think>is text here</think> ", "", "<think>is text here</think> "),
    (False, "", "", ""),
)


def parse(thinks, pieces):
    """Thought, answer, and the order in which both came, without empty pieces."""
    parser = ReasoningParser(thinks)
    thoughts, answers, order = "", "", []
    for thought, answer in (*map(parser.feed, pieces), parser.finish()):
        thoughts, answers = thoughts + thought, answers + answer
        order += ["thought"] * bool(thought) + ["answer"] * bool(answer)
    return thoughts, answers, [kind for kind, _ in itertools.groupby(order)]


def cuts(text, random_source):
    number = random_source.randrange(0, min(len(text), 12) + 1)
    places = sorted(random_source.sample(range(len(text) + 1), min(number, len(text) + 1)))
    return [text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])]


class TestReasoningParser(CustomTestCase):
    def test_every_cut_gives_the_same(self):
        source = random.Random(5)
        for thinks, reply, thought, answer in REPLIES:
            whole = parse(thinks, [reply])
            self.assertEqual(whole[:2], (thought, answer), reply)
            splits = [[reply[:i], reply[i:]] for i in range(len(reply) + 1)]
            splits += [list(reply), [""], *(cuts(reply, source) for _ in range(700))]
            for pieces in splits:
                if "".join(pieces) == reply:
                    self.assertEqual(parse(thinks, pieces), whole, pieces)

    def test_nothing_is_kept_longer_than_needed(self):
        parser = ReasoningParser(True)
        self.assertEqual(parser.feed("one two"), ("one two", ""))
        self.assertEqual(parser.feed(" "), ("", ""))
        self.assertEqual(parser.feed("three<"), (" three", ""))
        self.assertEqual(parser.feed("/think>4"), ("<"[:0], "4"))
        self.assertEqual(parser.feed("5 "), ("", "5 "))

    def test_where_a_reply_begins(self):
        for end, opens in (
            ("<|Assistant|><think>\n", True),
            ("<think>\n\n</think>\n\n", False),
            ("<|Assistant|></think>", False),
            ("user: <think> what is this<|Assistant|>", None),
            ("", None),
        ):
            self.assertEqual(opens_thought(end), opens, end)
        for message, continues in (
            ("<think>I begin", True),
            ("<think>a</think>The answer", False),
            ("a</think>b<think>c", True),
            ("The answer", None),
        ):
            self.assertEqual(continues_thought(message), continues, message)


if __name__ == "__main__":
    unittest.main()

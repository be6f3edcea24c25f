"""Thought and answer: the same for every way in which a reply is cut."""

import random
import unittest

from sglang.srt.parser.reasoning_parser import ReasoningParser, continues_thought, opens_thought
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.parser_cases import REPLIES, cuts, read_thought
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")


class TestReasoningParser(CustomTestCase):
    def test_every_cut_gives_the_same(self):
        chance = random.Random(5)
        for thinks, reply, thought, answer in REPLIES:
            whole = read_thought(thinks, [reply])
            self.assertEqual(whole[:2], (thought, answer), reply)
            for pieces in cuts(reply, 300, chance):
                self.assertEqual(read_thought(thinks, pieces), whole, pieces)

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

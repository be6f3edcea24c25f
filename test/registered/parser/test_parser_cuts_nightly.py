"""Ten thousand random cuts of every reply for each parser, and the cuts between its tokens."""

import random
import unittest

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.parser_cases import FORMS, REPLIES, cuts, read_calls, read_thought
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=600, suite="nightly-cpu", nightly=True)

NUM_CUTS = 10_000


def between_tokens(text):
    """The text of each token, where a token ends within no character."""
    tokenizer = Tokenizer.from_path(str(EMBEDDED_MODELS["qwen3.5-moe-tiny"]))
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces, said = [], 0
    for end in range(1, len(ids) + 1):
        told = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if text.startswith(told):
            pieces.append(told[said:])
            said = len(told)
    return pieces


class TestCuts(CustomTestCase):
    def test_tool_calls(self):
        for parser, replies in FORMS.items():
            for reply, events in replies:
                for pieces in (between_tokens(reply), *cuts(reply, NUM_CUTS, random.Random(8))):
                    self.assertEqual(read_calls(parser, pieces), events, (parser, pieces))

    def test_thoughts(self):
        for thinks, reply, *_ in REPLIES:
            whole = read_thought(thinks, [reply])
            for pieces in (between_tokens(reply), *cuts(reply, NUM_CUTS, random.Random(9))):
                self.assertEqual(read_thought(thinks, pieces), whole, pieces)


if __name__ == "__main__":
    unittest.main()

"""300 schemas, five random outputs of each by a model's own tokenizer, also along drafts: all follow their schema."""

import json
import random
import unittest

import jsonschema
import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.constrained.llguidance_backend import GuidanceBackend, grammar_of
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.grammar_walks import random_schema, walk
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=20, suite="nightly-cpu", nightly=True)

NUM_SCHEMAS, NUM_WALKS, NUM_DRAFTS = 300, 5, 3


class TestSchemas(CustomTestCase):
    def setUp(self):
        self.tokenizer = Tokenizer.from_path(str(EMBEDDED_MODELS["qwen3.5-moe-tiny"]))
        self.eos = list(self.tokenizer.eos_token_ids)
        self.vocab_size = self.tokenizer.vocab_size
        self.backend = GuidanceBackend(self.tokenizer.to_json(), self.vocab_size, self.eos)
        liked = ('"', "}", "]", ",", ":", "1")
        self.liked = frozenset(self.tokenizer.encode(text, add_special_tokens=False)[0] for text in liked)

    def test_every_output_follows_its_schema(self):
        chance = random.Random(11)
        finished = 0
        for number in range(NUM_SCHEMAS):
            schema = random_schema(chance)
            options = {"whitespace_flexible": number % 4 == 0}
            grammar = self.backend.compile(grammar_of("json_schema", json.dumps(schema), options))
            for _ in range(NUM_WALKS):
                ids = walk(self.backend, grammar.copy(None), self.eos, chance, self.liked)
                if ids is not None:
                    finished += 1
                    jsonschema.validate(json.loads(self.tokenizer.decode(ids, skip_special_tokens=False)), schema)
                    self.check_path(grammar, ids, chance)
        print(f"{finished} of {NUM_SCHEMAS * NUM_WALKS} outputs ended in time; all follow their schema")
        self.assertGreater(finished, NUM_SCHEMAS * NUM_WALKS * 0.6)

    def check_path(self, grammar, ids, chance):
        """At a random place of an output its next tokens, some of them wrong, as drafts: each row is that of a walk."""
        place = chance.randrange(len(ids) + 1)
        drafts = [token if chance.random() < 0.8 else chance.randrange(self.vocab_size) for token in ids[place:]]
        drafts = (drafts + [self.eos[0]] * NUM_DRAFTS)[:NUM_DRAFTS]
        state = grammar.copy(None)
        state.follow(ids[:place])
        mask = torch.full((NUM_DRAFTS + 1, self.backend.num_words), -1, dtype=torch.int32)
        if not state.is_complete:
            self.backend.fill_along([(state, 0)], [drafts], mask)
        for number in range(NUM_DRAFTS + 1):
            want = torch.full((1, self.backend.num_words), -1, dtype=torch.int32)
            if not state.is_complete and not state.error:
                self.backend.fill([(state, 0)], want)
            self.assertTrue(torch.equal(mask[number], want[0]), (ids, place, drafts, number))
            if number < NUM_DRAFTS and not state.is_complete and not state.error:
                state.take(drafts[number])


if __name__ == "__main__":
    unittest.main()

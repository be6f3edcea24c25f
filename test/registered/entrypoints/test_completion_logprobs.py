"""Log-probabilities of completions: no best token is lost, and each place is in the text that was returned."""

import json
import random
import tempfile
import unittest

from sglang.srt.entrypoints.openai.completion_logprobs import ChoiceLogprobs, named_row, token_name
from sglang.srt.managers.detokenizer_manager import RequestText
from sglang.srt.managers.io_struct import FinishReason, TokenIDOutput
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.fake_server import FakeServerTestCase
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import (
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    wordpiece_tokenizer,
    write_tokenizer,
)

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")


def tokenizer_of(test, make):
    folder = test.enterContext(tempfile.TemporaryDirectory())
    return Tokenizer.from_path(write_tokenizer(folder, make()))


def entries(tokenizer, ids, logprob=-1.0):
    return [(logprob, i, tokenizer.decode([i], skip_special_tokens=False)) for i in ids]


class Choice:
    """One choice as the endpoint builds it: real detokenizing of ``ids`` in messages of the given sizes."""

    def __init__(self, tokenizer, ids, sizes, stop=(), matched=None, skip=True, prompt=None, top=False):
        text = RequestText(self._output([], None, list(stop), skip), tokenizer)
        logprobs = ChoiceLogprobs(tokenizer, skip, top)
        self.text, self.chunks, start = "", [], 0
        for number, size in enumerate(sizes):
            last = number == len(sizes) - 1
            new = ids[start:] if last else ids[start : start + size]
            start += len(new)
            reason = None
            if last:
                kind = "stop" if matched is not None else "length"
                reason = FinishReason(type=kind, matched=matched, length=None if matched else len(ids))
            delta = text.push(self._output(new, reason, list(stop), skip))
            if number == 0 and prompt is not None:
                shown, was_text, prompt_ids = prompt
                logprobs.add_prompt(shown, was_text, {"input_token_logprobs": entries(tokenizer, prompt_ids)})
                delta = shown + delta
            logprobs.add_output({"output_token_logprobs": entries(tokenizer, new)})
            self.text += delta
            self.chunks.append((len(self.text), logprobs.release(len(delta), final=last)))
        self.offsets = [offset for _, chunk in self.chunks for offset in chunk.text_offset]
        self.tokens = [token for _, chunk in self.chunks for token in chunk.tokens]

    @staticmethod
    def _output(ids, reason, stop, skip):
        counts = {"prompt_tokens": 1, "completion_tokens": 1, "cached_tokens": 0}
        return TokenIDOutput(
            rid="r", output_ids=ids, finish_reason=reason, stop=stop, skip_special_tokens=skip, **counts
        )


class TestPlaces(CustomTestCase):
    def test_characters_of_several_bytes(self):
        tokenizer = tokenizer_of(self, byte_level_tokenizer)
        byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}

        def ids_of(data):
            return [byte[bytes([b])] for b in data]

        for data, places in (
            ("aé€b".encode(), [0, 1, 1, 2, 2, 2, 3]),
            ("😀a".encode(), [0, 0, 0, 0, 1]),
            # Each byte that starts no character, and each start that is not continued, is one replacement.
            (b"\x80\x80a", [0, 1, 2]),
            (b"\xe2a", [0, 1]),
            (b"\xe2\xe2\x82\xac", [0, 1, 1, 1]),
            (b"\xf0\x9f\xff", [0, 0, 1]),
            (b"a\xe2\x82", [0, 1, 1]),
        ):
            for sizes in ([len(data)], [1] * len(data)):
                got = Choice(tokenizer, ids_of(data), sizes)
                self.assertEqual((got.text, got.offsets), (data.decode("utf-8", "replace"), places), data)
            for skip in (True, False):
                prompt = tokenizer.decode(ids_of(data), skip), False, ids_of(data)
                got = Choice(tokenizer, ids_of(b"z"), [1], prompt=prompt, skip=skip)
                self.assertEqual(got.offsets[:-1], places, data)
                self.assertEqual(got.text[got.offsets[-1] :], "z")

    def test_special_tokens_take_room_only_where_they_are_shown(self):
        tokenizer = tokenizer_of(self, byte_level_tokenizer)
        a, b, bos = tokenizer.encode("a", False)[0], tokenizer.encode("b", False)[0], tokenizer.bos_token_id
        for skip, text, places in ((True, "ab", [0, 1, 1]), (False, "a<s>b", [0, 1, 4])):
            got = Choice(tokenizer, [a, bos, b], [1, 1, 1], skip=skip)
            self.assertEqual((got.text, got.offsets), (text, places))
            prompt = tokenizer.decode([a, bos, b], skip), False, [a, bos, b]
            got = Choice(tokenizer, [a], [1], skip=skip, prompt=prompt)
            self.assertEqual((got.text, got.offsets), (text + "a", [*places, len(text)]))
        # A text is returned as it came: what was put in front is nowhere in it, what it names is where it stands.
        for text, places in (("a", [0, 0]), ("a<s>b", [0, 0, 1, 4])):
            got = Choice(tokenizer, [a], [1], prompt=(text, True, [bos, *tokenizer.encode(text, False)]))
            self.assertEqual((got.text, got.offsets[:-1]), (text + "a", places))

    def test_random_tokens_in_every_grouping(self):
        """Streams and whole answers agree, no place is outside the text, and a whole token is at its place."""
        rng = random.Random(6)
        makers = {byte_level_tokenizer: True, sentencepiece_tokenizer: True, wordpiece_tokenizer: False}
        for make, exact in makers.items():
            tokenizer = tokenizer_of(self, make)
            for _ in range(60):
                # The last ids are words and characters, the first ones bytes.
                first = rng.choice((0, 260))
                first = min(first, tokenizer.vocab_size - 9)
                ids = [rng.randrange(first, tokenizer.vocab_size) for _ in range(rng.randrange(1, 14))]
                if not first:
                    ids += tokenizer.encode("naïve 😀 END and", False)
                skip = rng.random() < 0.5
                text = tokenizer.decode(ids, skip)
                stop = text[len(text) // 2 : len(text) // 2 + 3]
                stops, matched = ([stop], stop) if stop and "\ufffd" not in stop and rng.random() < 0.4 else ([], None)
                if matched:
                    ids = next(ids[:k] for k in range(1, len(ids) + 1) if stop in tokenizer.decode(ids[:k], skip))
                prompt_ids = rng.sample(ids, 1) * 2
                prompt = (tokenizer.decode(prompt_ids, skip), False, prompt_ids) if rng.random() < 0.5 else None
                groupings = ([len(ids)], [1] * len(ids), [2] * (len(ids) // 2 + 1))
                whole, *streams = (Choice(tokenizer, ids, s, stops, matched, skip, prompt) for s in groupings)
                label = f"{make.__name__} {ids} {stops} {skip}"
                for stream in streams:
                    self.assertEqual(stream.text, whole.text, label)
                    self.assertEqual((stream.tokens, stream.offsets), (whole.tokens, whole.offsets), label)
                    for sent, chunk in stream.chunks[:-1]:
                        self.assertTrue(all(offset < sent for offset in chunk.text_offset), label)
                self.assertEqual(whole.offsets, sorted(whole.offsets), label)
                self.assertLessEqual(whole.offsets[-1], len(whole.text), label)
                # A byte that SentencePiece falls back to is whole only where all bytes around it are.
                pieces = [tokenizer._backend.id_to_token(i) for i in [*prompt_ids, *ids]]
                if exact and not any(piece.startswith("<0x") for piece in pieces):
                    self.check_whole_tokens(tokenizer, whole, prompt_ids if prompt else [], ids, skip, label)

    def check_whole_tokens(self, tokenizer, choice, prompt_ids, ids, skip, label):
        for token_id, offset in zip([*prompt_ids, *ids], choice.offsets, strict=True):
            text = tokenizer.decode([token_id], skip)
            if "\ufffd" not in text and not text.isspace():
                rest = choice.text[offset:]
                self.assertTrue(rest.startswith(text) or text.startswith(rest), f"{label}: {text!r} at {offset}")


class TestNames(CustomTestCase):
    def test_none_is_lost(self):
        for make in (byte_level_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer):
            tokenizer = tokenizer_of(self, make)
            ids = list(range(tokenizer.vocab_size))
            random.Random(2).shuffle(ids)
            top = [(-float(rank), i, tokenizer.decode([i], False)) for rank, i in enumerate(ids)]
            for drawn in (top[0], top[-1], top[40]):
                for count in (1, 5, 20, len(ids)):
                    row = named_row(tokenizer, drawn, top[:count])
                    self.assertEqual(len(row), count + (drawn not in top[:count]))
                    self.assertEqual(list(row.values())[:count], [entry[0] for entry in top[:count]])
                    self.assertEqual(row[token_name(tokenizer, drawn[1], drawn[2])], drawn[0])

    def test_bytes_that_are_no_character_are_named_as_bytes(self):
        tokenizer = tokenizer_of(self, byte_level_tokenizer)
        byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
        self.assertEqual(token_name(tokenizer, byte[b"\xe2"], "\ufffd"), "bytes:\\xe2")
        self.assertEqual(token_name(tokenizer, byte[b"a"], "a"), "a")
        self.assertEqual(token_name(tokenizer_of(self, wordpiece_tokenizer), 5, None), "")

    def test_of_equal_texts_the_drawn_one_keeps_the_name(self):
        tokenizer = tokenizer_of(self, wordpiece_tokenizer)
        top = [(-1.0, 5, "x"), (-2.0, 6, "x"), (-3.0, 7, "y")]
        self.assertEqual(named_row(tokenizer, top[0], top), {"x": -1.0, "token_id:6": -2.0, "y": -3.0})
        self.assertEqual(named_row(tokenizer, top[1], top), {"token_id:5": -1.0, "x": -2.0, "y": -3.0})
        wanted = {"x": -1.0, "token_id:6": -2.0, "token_id:7": -3.0, "y": -9.0}
        self.assertEqual(named_row(tokenizer, (-9.0, 8, "y"), top), wanted)


class TestOverHttp(FakeServerTestCase):
    def complete(self, stream=False, **body):
        """Text and the four lists, streamed or not."""
        reply = self.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 3, "stream": stream, **body})
        self.assertEqual(reply.status_code, 200, reply.text)
        if not stream:
            choice = reply.json()["choices"][0]
            return choice["text"], choice["logprobs"]
        events = [json.loads(line[6:]) for line in reply.text.split("\n\n") if line.startswith("data: {")]
        text, lists = "", {}
        for event in events:
            for choice in event["choices"]:
                text += choice["text"]
                for name, values in choice["logprobs"].items():
                    lists[name] = lists.get(name, []) + values if values is not None else None
        return text, lists

    def test_prompt_rows_output_rows_and_streams(self):
        tokenizer = self.fake.tokenizer
        self.fake.scheduler.delay_s = 0.002
        for prompt in ("aé€b", tokenizer.encode("aé€b"), "a<s>b 😀"):
            for skip in (True, False):
                body = {"prompt": prompt, "echo": True, "logprobs": 30, "max_tokens": 6, "skip_special_tokens": skip}
                text, lists = self.complete(**body)
                self.assertEqual(self.complete(stream=True, **body), (text, lists))
                self.assertIsNone(lists["top_logprobs"][0])
                for row, name in list(zip(lists["top_logprobs"], lists["tokens"]))[1:]:
                    self.assertEqual(len(row), 30)
                    self.assertIn(name, row)
                for name, offset in zip(lists["tokens"], lists["text_offset"]):
                    self.assertLessEqual(offset, len(text))
                    if offset < len(text) and not name.startswith("bytes:") and name != "<s>":
                        self.assertEqual(text[offset : offset + len(name)], name)

    def test_a_stop_string_that_was_held_back(self):
        ids = self.fake.tokenizer.encode("one STOP", add_special_tokens=False)
        self.fake.scheduler.script, before = (lambda _: ids), self.fake.scheduler.script
        self.addCleanup(setattr, self.fake.scheduler, "script", before)
        self.fake.scheduler.delay_s = 0.002
        body = {"max_tokens": 50, "logprobs": 0, "stop": "STOP"}
        text, lists = self.complete(**body)
        self.assertEqual(text, "one ")
        self.assertEqual(len(lists["tokens"]), len(ids))
        self.assertLessEqual(max(lists["text_offset"]), len(text))
        self.assertEqual(self.complete(stream=True, **body), (text, lists))
        # What was held back comes after all: its places are not those of the text before it.
        ids[:] = [self.fake.tokenizer.encode(char, add_special_tokens=False)[0] for char in "a STO b"]
        body["max_tokens"] = len(ids)
        text, lists = self.complete(**body)
        self.assertEqual((text, lists["text_offset"]), ("a STO b", list(range(7))))
        self.assertEqual(self.complete(stream=True, **body), (text, lists))


if __name__ == "__main__":
    unittest.main()

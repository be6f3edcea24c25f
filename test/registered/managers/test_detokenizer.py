"""Incremental detokenization by brute force: the deltas join to the full text, cut at the stop string."""

import random
import tempfile
import types
import unittest

from sglang.srt.managers.detokenizer_manager import (
    ByteTextStream,
    DetokenizerManager,
    RequestText,
    StopTrimmer,
    WindowTextStream,
)
from sglang.srt.managers.io_struct import (
    BatchStrOutput,
    BatchTokenIDOutput,
    FinishReason,
    ShutdownReq,
    TokenIDOutput,
    TokenLogprobs,
)
from sglang.srt.managers.ipc import IpcNames, Receiver, Sender
from sglang.srt.managers.step_result import StopChecker
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import (
    CORPUS,
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    wordpiece_tokenizer,
    write_tokenizer,
)

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

STOP = FinishReason(type="stop", matched="x")


def load(build) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return Tokenizer.from_path(write_tokenizer(folder, build()))


BYTE_LEVEL = load(byte_level_tokenizer)
OTHERS = [load(sentencepiece_tokenizer), load(wordpiece_tokenizer)]


def output(ids, reason=None, **fields) -> TokenIDOutput:
    counts = {"prompt_tokens": 1, "completion_tokens": len(ids), "cached_tokens": 0}
    return TokenIDOutput(rid="r", output_ids=ids, finish_reason=reason, **counts, **fields)


def pieces(rng, ids):
    """``ids`` in messages of one to four tokens, the last of them final."""
    while ids:
        size = min(len(ids), rng.choice([1, 1, 1, 2, 4]))
        yield ids[:size], size == len(ids)
        ids = ids[size:]


class TestTextStreams(CustomTestCase):
    def test_random_ids_of_a_byte_level_tokenizer(self):
        """Any id sequence, so any bytes: the deltas join to exactly the library's decoding, for both strategies."""
        rng = random.Random(0)
        for round_ in range(300):
            ids = [rng.randrange(BYTE_LEVEL.vocab_size) for _ in range(rng.randrange(1, 60))]
            skip = bool(round_ % 2)
            for kind in (ByteTextStream, WindowTextStream):
                stream = kind(BYTE_LEVEL, skip)
                text = "".join(stream.push(part, final) for part, final in pieces(rng, ids))
                self.assertEqual(text, BYTE_LEVEL.decode(ids, skip), kind)

    def test_real_text_never_shows_half_a_character(self):
        rng = random.Random(1)
        texts = [*CORPUS, "👩‍👩‍👧‍👦🏳️‍🌈" * 6, "日本語" * 30, "a\u0301\u0302 b", "  lead", "x " * 80]
        for tokenizer in [BYTE_LEVEL, *OTHERS]:
            for text in texts:
                ids = tokenizer.encode(text, add_special_tokens=False)
                expected = tokenizer.decode(ids)
                for kind in (ByteTextStream, WindowTextStream):
                    if kind is ByteTextStream and tokenizer is not BYTE_LEVEL:
                        continue
                    stream, got = kind(tokenizer, True), ""
                    for part, final in pieces(rng, ids):
                        got += stream.push(part, final)
                        self.assertTrue(expected.startswith(got), (kind, text, got))
                    self.assertEqual(got, expected)

    def test_window_stays_short(self):
        """Half an hour of invalid bytes, or of tokens without text, must not grow the window."""
        for tokenizer in [BYTE_LEVEL, *OTHERS]:
            text_ids = tokenizer.encode("The quick " * 40, add_special_tokens=False)
            for ids in (text_ids, [tokenizer.bos_token_id] * 500, [tokenizer.encode("😀", False)[-1]] * 500):
                stream = WindowTextStream(tokenizer, True)
                for token_id in ids:
                    stream.push([token_id], False)
                    self.assertLessEqual(len(stream._window), 65)

    def test_invalid_bytes_are_sent_before_the_end(self):
        ids = [BYTE_LEVEL.encode("😀", False)[-1]] * 20
        for kind in (ByteTextStream, WindowTextStream):
            stream = kind(BYTE_LEVEL, True)
            self.assertGreaterEqual(len(stream.push(ids, False)), 16)


class TestHiddenTokens(CustomTestCase):
    """A stop string ends a request where the client sees it, whatever hidden tokens are in it, and in the raw text."""

    def oracle(self, tokenizer, ids, stops, skip):
        """The number of tokens until either text contains a stop string, and the text before it."""
        for count in range(1, len(ids) + 1):
            raw = tokenizer.decode(ids[:count], skip_special_tokens=False)
            seen = tokenizer.decode(ids[:count], skip_special_tokens=True) if skip else raw
            if any(stop in raw or stop in seen for stop in stops):
                cut = min((seen.find(stop) for stop in stops if stop in seen), default=len(seen))
                return count, seen[:cut]
        return len(ids), tokenizer.decode(ids, skip_special_tokens=skip)

    def test_random(self):
        rng = random.Random(11)
        by_hidden = 0
        for round_ in range(1500):
            skip = round_ % 4 != 0
            special = sorted(BYTE_LEVEL.all_special_ids)
            letters = [BYTE_LEVEL.encode(letter, add_special_tokens=False)[0] for letter in "ab"]
            weights = [5, 5] + [6 / len(special)] * len(special)
            ids = rng.choices(letters + special, weights, k=rng.randrange(1, 40))
            stops = ["".join(rng.choices("ab", k=rng.randrange(2, 7))) for _ in range(rng.randrange(1, 4))]
            if round_ % 10 == 0:
                stops.append(BYTE_LEVEL.decode([special[0]], skip_special_tokens=False) + "a")
            count, text = self.oracle(BYTE_LEVEL, ids, stops, skip)
            params = SamplingParams(max_new_tokens=len(ids), stop=stops, skip_special_tokens=skip)
            checker, reason, sent = StopChecker(BYTE_LEVEL), None, ""
            state = None
            for length in range(1, len(ids) + 1):
                req = types.SimpleNamespace(
                    grammar=None,
                    output_ids=ids[:length],
                    sampling_params=params,
                    stop_ids=frozenset(),
                    max_new_tokens=len(ids),
                )
                reason = checker.check(req)
                message = output(
                    ids[length - 1 : length], reason, stop=stops if length == 1 else [], skip_special_tokens=skip
                )
                state = state or RequestText(message, BYTE_LEVEL)
                sent += state.push(message)
                self.assertTrue(text.startswith(sent), f"{sent!r} was sent, {text!r} is right")
                if reason is not None:
                    break
            self.assertEqual((length, sent), (count, text), f"{stops} in {ids}")
            raw = BYTE_LEVEL.decode(ids[:count], skip_special_tokens=False)
            by_hidden += reason.type == "stop" and not any(stop in raw for stop in stops)
        self.assertGreater(by_hidden, 100)

    def test_many_hidden_tokens_within_a_stop_string(self):
        a, b = (BYTE_LEVEL.encode(letter, add_special_tokens=False)[0] for letter in "ab")
        hidden = min(BYTE_LEVEL.all_special_ids)
        req = types.SimpleNamespace(
            grammar=None,
            output_ids=[a] + [hidden] * 500 + [b], stop_ids=frozenset(), max_new_tokens=10**6,
            sampling_params=SamplingParams(stop=["ab"]),
        )  # fmt: skip
        self.assertEqual(StopChecker(BYTE_LEVEL).check(req).matched, "ab")
        req.sampling_params.skip_special_tokens = False
        self.assertIsNone(StopChecker(BYTE_LEVEL).check(req))


class TestStopTrimmer(CustomTestCase):
    def run_trimmer(self, stops, deltas, matched):
        """All text sent, after checking that no stop string, nor the start of one, was sent before the end."""
        trimmer, sent = StopTrimmer(stops), ""
        for delta in deltas[:-1]:
            sent += trimmer.push(delta)
        return sent, sent + trimmer.finish(deltas[-1], matched)

    def test_brute_force(self):
        """Random text over two letters against every split: the text up to the first stop, and never a letter more."""
        rng = random.Random(2)
        for _ in range(3000):
            stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
            text = "".join(rng.choices("ab", k=rng.randrange(0, 14)))
            ends = [text.find(s) + len(s) for s in stops if s in text]
            matched = bool(ends)
            if matched:
                # The scheduler stops with the token that completes a stop string.
                text = text[: min(ends)] + rng.choice(["", "b", "ab"])
            cut = min((p for p in map(text.find, stops) if p >= 0), default=len(text)) if matched else len(text)
            stop_end = min(ends, default=len(text) + 1)
            deltas, position = [], 0
            while position < min(stop_end - 1, len(text)):
                size = rng.randrange(0, 3)
                if position + size >= stop_end:
                    break
                deltas.append(text[position : position + size])
                position += size
            deltas.append(text[position:])
            early, whole = self.run_trimmer(stops, deltas, matched)
            self.assertEqual(whole, text[:cut], (stops, deltas))
            self.assertTrue(text[:cut].startswith(early), (stops, deltas, early))
            if not matched and stop_end > len(text):
                held = "".join(deltas[:-1])[len(early) :]
                self.assertTrue(held == "" or any(stop.startswith(held) for stop in stops), (stops, deltas, held))

    def test_a_stop_passed_over_by_the_scheduler_is_text(self):
        early, whole = self.run_trimmer(["END"], ["a END", "b", "c E", "ND"], matched=True)
        self.assertEqual((early, whole), ("a ENDbc ", "a ENDbc "))

    def test_the_scheduler_may_be_one_message_late(self):
        early, whole = self.run_trimmer(["END"], ["a EN", "D", "x"], matched=True)
        self.assertEqual((early, whole), ("a ", "a "))


class TestRequestText(CustomTestCase):
    def test_stop_strings_over_every_token_split(self):
        rng = random.Random(3)
        ids = BYTE_LEVEL.encode("alpha 😀 stop sto STOP! omega ###", False)
        full = BYTE_LEVEL.decode(ids)
        for stop in ("STOP", "stop sto STOP", "😀", "###", "! om", "a"):
            end = next(i for i in range(1, len(ids) + 1) if stop in BYTE_LEVEL.decode(ids[:i]))
            for _ in range(20):
                state, got = None, ""
                for part, final in pieces(rng, ids[:end]):
                    reason = FinishReason(type="stop", matched=stop) if final else None
                    message = output(part, reason, stop=[stop, "never"])
                    state = state or RequestText(message, BYTE_LEVEL)
                    got += state.push(message)
                    self.assertTrue(full[: full.index(stop)].startswith(got), (stop, got))
                self.assertEqual(got, full[: full.index(stop)])

    def test_text_is_that_of_the_tokens_however_messages_group_them(self):
        """Random ids under ``min_new_tokens``: what ends the request was completed last, what came before is text."""
        rng = random.Random(4)
        letters = [BYTE_LEVEL.encode(letter, False)[0] for letter in "ab"]
        emoji = BYTE_LEVEL.encode("😀", False)
        checker = StopChecker(BYTE_LEVEL)
        ended = 0
        for _ in range(1500):
            stops = ["".join(rng.choices("ab", k=rng.randrange(1, 5))) for _ in range(rng.randrange(1, 4))]
            params = SamplingParams(max_new_tokens=16, min_new_tokens=rng.randrange(0, 12), stop=stops)
            req = types.SimpleNamespace(
                sampling_params=params, output_ids=[], stop_ids=(), max_new_tokens=16, grammar=None
            )
            reason = None
            while reason is None:
                req.output_ids.append(rng.choice(letters * 2 + emoji))
                reason = checker.check(req)
            self.assertGreaterEqual(len(req.output_ids), params.min_new_tokens)
            whole = self.push_all(output(req.output_ids, reason, stop=stops))
            full = BYTE_LEVEL.decode(req.output_ids)
            if reason.type == "stop":
                ended += 1
                old = BYTE_LEVEL.decode(req.output_ids[:-1])
                new = [p for p in range(len(full)) for s in stops if full.startswith(s, p) and not old.startswith(s, p)]
                self.assertEqual(whole, full[: min(new)], (stops, full))
            else:
                self.assertEqual(whole, full)
            parts = list(pieces(rng, req.output_ids))
            streamed = self.push_all(*(output(p, reason if final else None, stop=stops) for p, final in parts))
            self.assertEqual(streamed, whole, (stops, full))
        self.assertGreater(ended, 300)

    def push_all(self, *messages):
        state = RequestText(messages[0], BYTE_LEVEL)
        return "".join(state.push(message) for message in messages)

    def test_no_stop_trim_keeps_all(self):
        ids = BYTE_LEVEL.encode("say END", False)
        reason = FinishReason(type="stop", matched="END")
        self.assertEqual(self.push_all(output(ids, reason, stop=["END"], no_stop_trim=True)), "say END")
        self.assertEqual(self.push_all(output(ids, reason, stop=["END"])), "say ")

    def test_stop_token_is_not_text(self):
        ids = BYTE_LEVEL.encode("ab", False)
        for token_id, skip in ((BYTE_LEVEL.eos_token_id, False), (BYTE_LEVEL.encode("!", False)[0], True)):
            reason = FinishReason(type="stop", matched=token_id)
            self.assertEqual(self.push_all(output([*ids, token_id], reason, skip_special_tokens=skip)), "ab")
            kept = self.push_all(output([*ids, token_id], reason, skip_special_tokens=skip, no_stop_trim=True))
            self.assertEqual(kept, "ab" + BYTE_LEVEL.decode([token_id], False))

    def test_held_text_is_released_when_the_request_ends_otherwise(self):
        ids = BYTE_LEVEL.encode("say EN", False)
        for kind in ("length", "abort"):
            first, last = output(ids, stop=["END"]), output([], FinishReason(type=kind), stop=["END"])
            self.assertEqual(self.push_all(first, last), "say EN")

    def test_half_a_character_at_the_end_is_one_replacement(self):
        ids = BYTE_LEVEL.encode("😀", False)[:-1] or [BYTE_LEVEL.encode("😀", False)[0]]
        self.assertEqual(self.push_all(output(ids), output([], FinishReason(type="length"))), BYTE_LEVEL.decode(ids))


class TestManagerOnTheWire(CustomTestCase):
    def test_messages_pass_and_state_is_dropped(self):
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(folder, byte_level_tokenizer())
            args = types.SimpleNamespace(skip_tokenizer_init=False, tokenizer_path=folder, model_path="none")
            names = IpcNames.create()
            self.addCleanup(names.remove)
            manager = DetokenizerManager(args, names)
        inbox, outbox = Receiver(names.tokenizer, BatchStrOutput), Sender(names.detokenizer)
        self.addCleanup(inbox.close)
        self.addCleanup(outbox.close)
        logprobs = TokenLogprobs(logprobs=[-1.0], ids=[5], top=[[(-1.0, 5)]])
        ids = BYTE_LEVEL.encode("hi😀", False)
        outbox.send(BatchTokenIDOutput(outputs=[output(ids[:-1], output_logprobs=logprobs)]))
        outbox.send(BatchTokenIDOutput(outputs=[output(ids[-1:], FinishReason(type="abort", message="gone"))]))
        outbox.send(ShutdownReq())
        manager.event_loop()
        first, second = inbox.recv().outputs[0], inbox.recv().outputs[0]
        self.assertEqual(first.text + second.text, "hi😀")
        self.assertEqual(first.output_logprobs, logprobs)
        self.assertEqual(second.finish_reason.message, "gone")
        self.assertEqual(manager._requests, {})
        manager.close()

    def test_a_request_that_cannot_be_decoded_ends_alone(self):
        args = types.SimpleNamespace(skip_tokenizer_init=True)
        names = IpcNames.create()
        manager = DetokenizerManager(args, names)
        self.addCleanup(names.remove)
        self.addCleanup(manager.close)
        manager.tokenizer = BYTE_LEVEL
        letter = BYTE_LEVEL.encode("a", add_special_tokens=False)[0]
        messages = [output([letter]), output([-7]), output([letter])]
        for rid, message in zip("abc", messages, strict=True):
            message.rid = rid
        outputs = manager.handle(BatchTokenIDOutput(outputs=messages)).outputs
        self.assertEqual([one.text for one in outputs], ["a", "", "a"])
        reasons = [one.finish_reason for one in outputs]
        self.assertEqual((reasons[0], reasons[2], reasons[1].type, reasons[1].status_code), (None, None, "abort", 500))
        self.assertEqual(set(manager._requests), {"a", "c"})

    def test_without_a_tokenizer_ids_pass_through(self):
        names = IpcNames.create()
        self.addCleanup(names.remove)
        manager = DetokenizerManager(types.SimpleNamespace(skip_tokenizer_init=True), names)
        result = manager.handle(BatchTokenIDOutput(outputs=[output([1, 2], STOP)])).outputs[0]
        self.assertEqual((result.text, result.output_ids), ("", [1, 2]))
        manager.close()


if __name__ == "__main__":
    unittest.main()

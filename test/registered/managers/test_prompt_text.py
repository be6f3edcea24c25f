"""Text to ids and back: bounds before any work, other threads that continue, and the same ids as one call gives."""

import tempfile
import threading
import time
import unittest
from unittest import mock

from sglang.srt.managers import prompt_text
from sglang.srt.managers.prompt_text import PromptEncoder
from sglang.srt.managers.request_input import RequestError
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer, sentencepiece_tokenizer, write_tokenizer

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

CONTEXT = 64


def _share_of_longest_pause(work):
    """Longest time in which another thread did not run, as a share of the time that ``work`` took."""
    pauses, stop = [0.0], threading.Event()

    def tick():
        last = time.perf_counter()
        while not stop.is_set():
            time.sleep(0.001)
            now = time.perf_counter()
            pauses.append(now - last)
            last = now

    thread = threading.Thread(target=tick)
    thread.start()
    began = time.perf_counter()
    work()
    took = time.perf_counter() - began
    stop.set()
    thread.join()
    return max(pauses) / took


class TestPromptEncoder(CustomTestCase, unittest.IsolatedAsyncioTestCase):
    def encoder(self, make=byte_level_tokenizer, context_len=CONTEXT):
        tokenizer = Tokenizer.from_path(write_tokenizer(self.enterContext(tempfile.TemporaryDirectory()), make()))
        encoder = PromptEncoder(tokenizer, context_len, tokenizer.vocab_size)
        self.addCleanup(encoder.close)
        return tokenizer, encoder

    async def refusal(self, encoder, text):
        with self.assertRaises(RequestError) as caught:
            await encoder.encode(text)
        self.assertEqual(caught.exception.status_code, 400)
        return caught.exception.message

    async def test_a_text_past_the_longest_possible_is_refused_untokenized(self):
        for make in (byte_level_tokenizer, sentencepiece_tokenizer):
            tokenizer, encoder = self.encoder(make)
            longest = max(tokenizer._backend.get_vocab(with_added_tokens=True), key=len)
            most = CONTEXT * len(longest)
            with mock.patch.object(tokenizer, "_backend", None):
                message = await self.refusal(encoder, "a" * (most + 1))
            for number in (most + 1, CONTEXT, len(longest), most):
                self.assertIn(str(number), message)
            with mock.patch.object(tokenizer, "count_tokens", return_value=1):
                await encoder.encode((longest * CONTEXT)[:most])

    async def test_far_too_many_tokens_are_found_piece_by_piece(self):
        tokenizer, encoder = self.encoder()
        with mock.patch.object(prompt_text, "_PIECE_CHARS", 50), mock.patch.object(tokenizer, "encode") as whole:
            count = tokenizer.count_tokens
            with mock.patch.object(tokenizer, "count_tokens", side_effect=count) as counted:
                message = await self.refusal(encoder, "é" * (3 * CONTEXT))
        self.assertIn(f"more than {2 * CONTEXT} tokens", message)
        whole.assert_not_called()
        self.assertLess(counted.call_count, 5)

    async def test_ids_are_those_of_one_call(self):
        tokenizer, encoder = self.encoder(context_len=10_000)
        for text in ("a", "straße 你好 " * 40, "The quick brown fox. " * 600, "stop " * 5000):
            for special in (True, False):
                ids = tokenizer._backend.encode(text, add_special_tokens=special).ids
                self.assertEqual(await encoder.encode(text, special), ids)
                self.assertEqual(await encoder.decode(ids), tokenizer._backend.decode(ids))

    async def test_text_that_has_no_utf8(self):
        _, encoder = self.encoder(context_len=10_000)
        for text in ("a\ud800", "a" * 9000 + "\udfff"):
            self.assertIn("not valid Unicode", await self.refusal(encoder, text))

    def test_other_threads_run_meanwhile(self):
        tokenizer, _ = self.encoder()
        text = "a" * 400_000
        ids = tokenizer.encode(text)
        for name, work in (
            ("encode", lambda: tokenizer.encode(text)),
            ("count", lambda: tokenizer.count_tokens(text)),
            ("decode", lambda: tokenizer.decode(ids * 4)),
        ):
            # The best of three: a busy machine stops threads as well.
            share = min(_share_of_longest_pause(work) for _ in range(3))
            self.assertLess(share, 0.6, name)


if __name__ == "__main__":
    unittest.main()

"""DeepSeek V4 over a window pool of its own size: the same answers where pages are given back, evicted, revived."""

import tempfile
import unittest
from collections import Counter
from unittest.mock import patch

import torch

from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.mem_cache.window_companion import WindowCompanion
from sglang.srt.mem_cache.window_pages import WindowPages
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp

register_cpu_ci(est_time=60, suite="stage-b-test-cpu")

TOLERANCE = 1e-4
NEW_TOKENS = 20


def prompts():
    """Prompts that share 512, 256 or no tokens, in the order in which they come; some twice, and longer then."""
    generator = torch.Generator().manual_seed(5)
    first, second, third = (torch.randint(3, 512, (700,), generator=generator).tolist() for _ in range(3))
    return {
        "first": first[:540],
        "second": second[:610],
        "hit-512": first[:520] + second[:30],
        "hit-256": first[:300] + second[30:70],
        "third": third[:530],
        "page": first[:257],
        "below-page": second[-1:] + first[:244],
        "first again": first[:600],
        "one": second[:1],
        "second again": second,
        "third again": third[:550],
    }


class Events:
    """Counts what happens to windows while it is entered."""

    def __init__(self):
        self.counts = Counter()

    def __enter__(self):
        evict, move, take_back = WindowCompanion.evict, WindowPages.move, WindowPages.take_back
        retract, usable_len = Scheduler._retract, WindowCompanion.usable_len

        def counting(name, method):
            def counted(*args):
                result = method(*args)
                self.counts[name] += 1 if result is None else result
                return result

            return counted

        def counting_usable(companion, node, num_tokens):
            usable = usable_len(companion, node, num_tokens)
            self.counts["hits cut short"] += usable < num_tokens
            return usable

        self.patches = [
            patch.object(WindowCompanion, "evict", counting("evicted", evict)),
            patch.object(WindowPages, "move", counting("revived", move)),
            patch.object(WindowPages, "take_back", counting("given back", take_back)),
            patch.object(Scheduler, "_retract", counting("retracted", retract)),
            patch.object(WindowCompanion, "usable_len", counting_usable),
        ]
        for each in self.patches:
            each.start()
        return self

    def __exit__(self, *error):
        for each in self.patches:
            each.stop()


class TestDeepseekV4Window(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)  # small products: more threads only wait for one another
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        cls.hf, _ = save_tiny_v4_mtp(folder.name)
        cls.plain, _ = cls.serve(swa_full_tokens_ratio=1.0, disable_radix_cache=True)

    @classmethod
    def serve(cls, steps=0, retract=False, abort="", **options):
        """Answers by request, and cached tokens."""
        sizes = {"max_total_tokens": 16384, "max_running_requests": 8, "context_length": 1024, "random_seed": 1}
        spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": steps} if steps else {}
        with (
            envs.SGLANG_DEBUG_POOL_CHECK.override(True),
            envs.SGLANG_TEST_RETRACT.override(retract),
            envs.SGLANG_TEST_RETRACT_INTERVAL.override(5),
        ):
            engine = EngineHarness(cls.folder, **{**sizes, **spec, **options})
        for number, (rid, prompt) in enumerate(prompts().items()):
            params = SamplingParams(
                temperature=0.7 * (number % 2), max_new_tokens=NEW_TOKENS, ignore_eos=True, sampling_seed=number
            )
            engine.submit(rid, prompt, params, return_logprob=True)
            for _ in range(4):
                engine.step()
            if rid == abort:
                engine.inbox.append(AbortReq(rid=rid))
        results = engine.run()
        answers = {rid: (result.output_ids, result.output_logprobs.logprobs) for rid, result in results.items()}
        return answers, {rid: result.cached_tokens for rid, result in results.items()}

    def assert_same(self, found, but=""):
        self.assertEqual(set(found), set(self.plain))
        for rid, (ids, logprobs) in self.plain.items():
            if rid != but:
                self.assertEqual(found[rid][0], ids, rid)
                for ours, theirs in zip(found[rid][1], logprobs, strict=True):
                    self.assertAlmostEqual(ours, theirs, delta=TOLERANCE, msg=rid)

    def check(self, *events, **what):
        """The same answers, and that these things really happened; the cached tokens of each request."""
        with Events() as seen:
            found, cached = self.serve(**what)
        self.assert_same(found, but=what.get("abort", ""))
        self.assertTrue(all(seen.counts[name] for name in events), seen.counts)
        return cached

    def test_with_a_window_of_full_length_it_is_as_transformers(self):
        for rid in ("hit-512", "first again"):
            prompt, (ids, logprobs) = prompts()[rid], self.plain[rid]
            with torch.inference_mode():
                truth = self.hf(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
            for row, token in enumerate(ids):
                self.assertAlmostEqual(logprobs[row], float(truth[row, token]), delta=TOLERANCE)

    def test_room_for_all(self):
        """Nothing is evicted, and every shared page is found."""
        cached = self.check("given back", swa_full_tokens_ratio=16 / 64)
        shared = {"hit-512": 512, "hit-256": 256, "page": 256, "first again": 512, "second again": 512}
        self.assertEqual({rid: number for rid, number in cached.items() if number}, {**shared, "third again": 512})

    def test_chunks_over_the_least_window(self):
        events = ("given back", "evicted", "revived", "hits cut short")
        self.check(*events, swa_full_tokens_ratio=4 / 64, chunked_prefill_size=256, overlap=True)

    def test_drafts_and_retractions(self):
        events = ("given back", "evicted", "retracted")
        self.check(*events, swa_full_tokens_ratio=6 / 64, steps=3, overlap=True, retract=True, abort="third")


if __name__ == "__main__":
    unittest.main()

"""DeepSeek V4 served: scheduler, pools and model against transformers, with prefix hits, chunks and retraction."""

import tempfile
import unittest

import torch

from sglang.srt.platforms import override_platform
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cpu_ci(est_time=30, suite="stage-b-test-cpu")


class Gfx942(CpuPlatform):
    """A machine whose 8-bit floats are FNUZ."""

    arch = "gfx942"


TOLERANCE = 1e-4
TIE = 2e-4
NEW_TOKENS = 12


def params(num_new=NEW_TOKENS):
    return SamplingParams(temperature=0.0, max_new_tokens=num_new, ignore_eos=True)


class TestDeepseekV4Serving(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)  # small products: more threads only wait for one another
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.hf = save_tiny_checkpoint("dsv4", cls.folder)
        generator = torch.Generator().manual_seed(5)
        stem, tail = (torch.randint(3, 512, (size,), generator=generator).tolist() for size in (540, 130))
        cls.prompts = {
            "stem": stem,
            "hit-512": stem[:520] + tail[:30],
            "hit-256": stem[:300] + tail[30:70],
            # One token more than a page is known, and exactly what is known.
            "page": stem[:257],
            "below-page": tail[-1:] + stem[:244],
            "window": tail[:127],
            "one": tail[:1],
        }
        cls.memo = {}

    def truth(self, ids):
        """transformers' log-probabilities of a full forward."""
        if tuple(ids) not in self.memo:
            with torch.inference_mode():
                self.memo[tuple(ids)] = self.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        return self.memo[tuple(ids)]

    def check(self, rid, result, num_new=NEW_TOKENS):
        """Greedy tokens and all log-probabilities, along the sampled tokens."""
        prompt = self.prompts[rid.split("@")[0]]
        self.assertEqual(len(result.output_ids), num_new, rid)
        truth = self.truth(prompt + result.output_ids)[len(prompt) - 1 :]
        for offset, token in enumerate(result.output_ids):
            best = truth[offset].topk(2)
            if int(best.indices[0]) != token:
                self.assertLess(float(best.values[0] - best.values[1]), TIE, f"{rid}: token {offset} differs")
            found = result.output_logprobs.logprobs[offset]
            self.assertAlmostEqual(found, float(truth[offset, token]), delta=TOLERANCE, msg=f"{rid}: token {offset}")

    def engine(self, **options):
        defaults = {"max_total_tokens": 4096, "max_running_requests": 8, "random_seed": 1, "context_length": 1024}
        return EngineHarness(self.folder, **{**defaults, **options})

    def test_backend_and_page_are_chosen_unasked(self):
        args = self.engine().args
        self.assertEqual((args.attention_backend, args.page_size), ("dsv4", 256))

    def test_prefix_hits(self):
        """Hits end with pages, and what follows them is as if all had been computed."""
        engine = self.engine()
        engine.submit("stem", self.prompts["stem"], params(), return_logprob=True)
        engine.run()
        for rid, prompt in self.prompts.items():
            engine.submit(f"{rid}@again", prompt, params(), return_logprob=True)
        results = engine.run()
        for rid, result in results.items():
            self.check(rid, result)
        cached = {rid: result.cached_tokens for rid, result in results.items()}
        expected = {"stem": 0, "stem@again": 512, "hit-512@again": 512, "hit-256@again": 256, "page@again": 256}
        self.assertEqual(cached, {**expected, "below-page@again": 0, "window@again": 0, "one@again": 0})

    def test_chunks_without_cache(self):
        for options in (
            {"chunked_prefill_size": 256, "disable_radix_cache": True, "enable_mixed_chunk": True},
            {"chunked_prefill_size": 256, "overlap": True},
        ):
            with self.subTest(**options):
                engine = self.engine(**options)
                for rid, prompt in self.prompts.items():
                    engine.submit(rid, prompt, params(), return_logprob=True)
                for rid, result in engine.run().items():
                    self.check(rid, result)

    def test_caches_of_8_bits(self):
        """Log-probabilities move by rounding alone; hits and chunks give the same ones; FNUZ as on gfx942."""
        for platform in (CpuPlatform(), Gfx942()):
            with override_platform(platform):
                engine = self.engine(kv_cache_dtype="fp8_e4m3")
                for rid in ("stem", "hit-512", "window"):
                    engine.submit(rid, self.prompts[rid], params(), return_logprob=True)
                first = engine.run()
                engine.submit("hit-512@again", self.prompts["hit-512"], params(), return_logprob=True)
                again = engine.run()["hit-512@again"]
            self.assertEqual(again.cached_tokens, 512)
            self.assertEqual(again.output_ids, first["hit-512"].output_ids)
            for rid, result in first.items():
                prompt = self.prompts[rid.split("@")[0]]
                truth = self.truth(prompt + result.output_ids)[len(prompt) - 1 :]
                wanted = truth[:-1].gather(1, torch.tensor(result.output_ids).unsqueeze(1)).squeeze(1)
                off = torch.tensor(result.output_logprobs.logprobs) - wanted
                self.assertLess(float(off.square().mean().sqrt()), 0.15, (platform.arch, rid))
                self.assertGreater(float(off.abs().max()), 1e-4, "nothing was rounded")

    def test_after_retraction(self):
        """Requests that lose their pages on the way compute the same tokens again."""
        engine = self.engine()
        names = ("below-page", "page", "hit-256", "window")
        for rid in names:
            engine.submit(rid, self.prompts[rid], params(24), return_logprob=True)
        for _ in range(5):
            for _ in range(4):
                engine.step()
            engine.scheduler._retract_one_for_test()
        results = engine.run()
        for rid, result in results.items():
            self.check(rid, result, 24)
        retracted = [result.num_retractions for result in results.values()]
        self.assertGreater(sum(retracted), 2, f"{retracted}: too few for this test")


if __name__ == "__main__":
    unittest.main()

"""DeepSeek V4 over a window pool of its own size: the same output if pages are freed, evicted, restored."""

import unittest

import torch

from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.v4_window_serving import SIZES, WindowCase, window_prompts

register_cpu_ci(est_time=25, suite="stage-b-test-cpu")


class TestDeepseekV4Window(WindowCase):
    def test_with_a_window_of_full_length_it_is_as_transformers(self):
        for rid in ("hit-512", "first again"):
            prompt, (ids, logprobs) = window_prompts()[rid], self.plain[rid]
            with torch.inference_mode():
                truth = self.hf(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
            for row, token in enumerate(ids):
                self.assertAlmostEqual(logprobs[row], float(truth[row, token]), delta=1e-4)

    def test_room_for_all(self):
        """Nothing is evicted, and every shared page is found."""
        cached = self.check(16, "given back")
        shared = {"hit-512": 512, "hit-256": 256, "page": 256, "first again": 512, "second again": 512}
        self.assertEqual({rid: number for rid, number in cached.items() if number}, {**shared, "third again": 512})

    def test_chunks_over_the_least_window(self):
        self.check(4, "given back", "evicted", "revived", "hits cut short", chunked_prefill_size=256, overlap=True)

    def test_drafts_and_retractions(self):
        self.check(6, "given back", "evicted", "retracted", steps=3, overlap=True, retract=True, abort="third")

    def test_a_window_that_is_lost_ends_its_request_by_name(self):
        """Others continue, and nothing of it is returned or cached."""
        engine = EngineHarness(self.folder, swa_full_tokens_ratio=0.25, **SIZES)
        params = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
        for rid in ("first", "third"):
            engine.submit(rid, window_prompts()[rid], params)
        for _ in range(4):
            engine.step()
        req = next(req for req in engine.scheduler.running_reqs if req.rid == "first")
        last = engine.memory.req_pool.read(req.req_pool_idx, 512, 513).numpy() // 256
        engine.memory.allocator.window.take_back(last)
        before = len(req.output_ids)
        results = engine.run()
        self.assertIn("logits that are not numbers", results["first"].finish_reason.message)
        self.assertEqual((len(results["first"].output_ids), len(results["third"].output_ids)), (before, 12))
        match = engine.memory.tree.match_prefix(window_prompts()["first"])
        self.assertEqual((match.slot_ids.numel(), match.kv_len), (0, 0))


if __name__ == "__main__":
    unittest.main()

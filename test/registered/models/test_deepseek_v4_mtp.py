"""DeepSeek V4's MTP layer against transformers' own parts put together; served with and without it."""

import re
import tempfile
import unittest

import torch
from safetensors.torch import load_file, save_file

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.loader import load_draft_model
from sglang.srt.models.checkpoint_model import WeightLoadError
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mtp_harness import MtpHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp
from sglang.test.v4_mtp_serving import difference, prompts_around, serve

register_cpu_ci(est_time=30, suite="stage-b-test-cpu")

TOLERANCE = 1e-4
LENGTH = 270


class TestDeepseekV4Mtp(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)  # small products: more threads only wait for one another
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.hf, cls.mtp = save_tiny_v4_mtp(cls.folder)
        cls.ids = torch.randint(3, 512, (LENGTH + 1,), generator=torch.Generator().manual_seed(3)).tolist()
        cls.streams = cls.mtp.target_streams(cls.ids[:-1])
        cls.truth, cls.own = cls.mtp(cls.ids[1:], cls.streams)
        cls.harness = MtpHarness(cls.folder, page_size=256, num_slots=4096)

    def assert_close(self, found, wanted):
        self.assertEqual(found.shape, wanted.shape)
        self.assertLess((found - wanted).abs().max().item(), TOLERANCE)

    def test_rows_of_a_prompt(self):
        """All at once and in chunks; the layer gets the target's streams and gives its own."""
        self.assertGreater(self.truth.std().item(), 0.3)
        for size in (LENGTH, 64):
            self.harness.reset()
            self.harness.poison_draft()
            request, found = self.harness.new_request(), []
            for start in range(0, LENGTH, size):
                self.harness.extend([(request, self.ids[start : min(start + size, LENGTH)])])
                rows = slice(start, min(start + size, LENGTH))
                self.assert_close(self.harness.hidden, self.streams[rows].flatten(1))
                found.append(self.harness.draft_extend(self.ids[rows.start + 1 : rows.stop + 1]))
            self.assert_close(torch.cat([logprobs for logprobs, _ in found]), self.truth)
            self.assert_close(torch.cat([streams for _, streams in found]), self.own.flatten(1))

    def test_a_chain_of_its_own(self):
        """Each draft is computed from the streams of the one before."""
        for length in (5, 126, 257):
            self.harness.reset()
            self.harness.poison_draft()
            request = self.harness.new_request()
            self.harness.extend([(request, self.ids[:length])])
            given, streams = self.ids[1 : length + 1], self.streams[:length]
            logprobs, rows = self.harness.draft_extend(given)
            row = rows[-1:]
            for _ in range(3):
                wanted, own = self.mtp(given, streams)
                self.assert_close(logprobs[-1], wanted[-1])
                given = [*given, int(wanted[-1].argmax())]
                streams = torch.cat((streams, own[-1:]))
                logprobs, row = self.harness.draft_decode(request, given[-1], row)

    def test_blocks_of_another_kind_are_refused_by_name(self):
        tensors = load_file(f"{self.folder}/model.safetensors")
        for name, others in (
            ("mtp.1.attn.wq_a.weight", {"mtp.1.attn.wq_a.weight": torch.ones(2, 2)}),
            ("mtp.0.markov.weight", {"mtp.0.markov.weight": torch.ones(2)}),
            ("model.e_proj.weight", {"mtp.0.e_proj.weight": None}),
        ):
            changed = {key: tensor for key, tensor in (tensors | others).items() if tensor is not None}
            with self.subTest(name=name), tempfile.TemporaryDirectory() as folder:
                save_file(changed, f"{folder}/model.safetensors")
                with open(f"{self.folder}/config.json") as config, open(f"{folder}/config.json", "w") as copy:
                    copy.write(config.read())
                with override_server_args(), self.assertRaisesRegex(WeightLoadError, re.escape(name)) as caught:
                    load_draft_model(ModelConfig.from_path(folder), ServerArgs(model_path=folder), self.harness.model)
                self.assertIn("DSpark", str(caught.exception))

    def test_copies_of_the_target_are_not_taken(self):
        for name in ("mtp.0.emb.weight", "mtp.0.head.weight", "layers.0.attn.wq_a.weight", "model.norm.weight"):
            self.assertIsNone(self.harness.draft.checkpoint_name(name))


class TestServedWithDrafts(CustomTestCase):
    """The output is the same as without drafts: with drafts of the layer, and with right and wrong ones."""

    def test_the_same_tokens(self):
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_v4_mtp(folder)
            prompts = prompts_around((1, 124, 126, 253, 255, 257, 509))
            plain, _ = serve(folder, prompts)
            for rule, steps in (("model", 3), ("errant", 3), ("wrong at the end", 1)):
                with self.subTest(rule=rule, steps=steps):
                    found, drafter = serve(folder, prompts, steps, rule, plain)
                    self.assertEqual(difference(found, plain, TOLERANCE), "")
                    if rule == "errant":
                        self.assertTrue(all(drafter.num_by_length[1:]), drafter.num_by_length)


if __name__ == "__main__":
    unittest.main()

"""What trains the embedded DeepSeek V4 computes what transformers does, and gives a gradient where that has none."""

import sys
import unittest
from pathlib import Path

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-a-test-cpu")

SCRIPTS = Path(__file__).resolve().parents[3] / "scripts"


def setUpModule() -> None:
    sys.path.insert(0, str(SCRIPTS))


def tearDownModule() -> None:
    sys.path.remove(str(SCRIPTS))


def noisy_model():
    """transformers' model of the embedded configuration with clamps that bite, in numbers that tell parts apart."""
    from tiny_model_files import DEEPSEEK_V4

    from sglang.test.tiny_checkpoints import build_hf_model

    return build_hf_model(DEEPSEEK_V4 | {"swiglu_limit": 0.5}, 1)


class TestDenseModel(CustomTestCase):
    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        from dense_deepseek_v4 import DenseDeepseekV4

        cls.model = noisy_model()
        cls.dense = DenseDeepseekV4(cls.model, 1024)
        cls.generator = torch.Generator().manual_seed(3)

    def ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(0, 288, shape, generator=self.generator)

    @torch.no_grad()
    def test_logits_of_transformers(self) -> None:
        from dense_deepseek_v4 import Pass

        # No entry at all, one, an odd end, the longest row computed at once, rows in blocks with the indexer's choice.
        for length in (3, 4, 127, 256, 640):
            with self.subTest(length=length):
                ids = self.ids(2, length)
                self.assertLess((self.dense(ids, Pass()) - self.model(ids, use_cache=False).logits).abs().max(), 1e-4)

    @torch.no_grad()
    def test_the_choice_and_a_narrow_window_change_what_is_seen(self) -> None:
        from dense_deepseek_v4 import Pass

        ids = self.ids(2, 256)
        whole = self.dense(ids, Pass())
        narrow = self.dense(ids, Pass(window=torch.tensor([16, 128]).view(2, 1, 1, 1)))
        self.assertEqual((narrow[1] - whole[1]).abs().max(), 0)
        self.assertEqual((narrow[0, :16] - whole[0, :16]).abs().max(), 0)
        self.assertGreater((narrow[0] - whole[0]).abs().max(), 0.1)
        self.assertGreater((self.dense(ids, Pass(select=False)) - whole).abs().max(), 0.1)

    def test_only_its_own_loss_trains_the_indexer(self) -> None:
        from dense_deepseek_v4 import Pass

        asked = Pass(select=False, index_weights=torch.ones(1, 384))
        loss = self.dense(self.ids(1, 384), asked).square().mean()
        named = dict(self.model.named_parameters())
        for own, terms in ((False, [loss]), (True, asked.index_losses)):
            self.assertTrue(terms)
            grads = torch.autograd.grad(sum(terms), named.values(), retain_graph=True, allow_unused=True)
            moved = {name for name, grad in zip(named, grads) if grad is not None and grad.abs().max() > 0}
            self.assertEqual(moved, {name for name in named if (".indexer." in name) == own})

    @torch.no_grad()
    def test_first_drafts_of_the_assembled_layer(self) -> None:
        import train_deepseek_v4_tiny as script

        from sglang.test.v4_mtp_reference import V4Mtp

        trainer = script.V4DraftTrainer.__new__(script.V4DraftTrainer)
        trainer.device, trainer.model, trainer.dense = torch.device("cpu"), self.model, self.dense
        trainer.layer = V4Mtp(self.model).float().eval()
        generator = torch.Generator().manual_seed(5)
        for name, tensor in trainer.layer.named_parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.08 + ("norm" in name))
        # Longer than the window, which first drafts see behind them.
        ids = self.ids(1, 256)
        streams = trainer.hidden(ids)
        first = next(trainer.chain(ids, streams)).log_softmax(-1)[0]
        wanted, _ = trainer.layer(ids[0, 1:].tolist(), streams[0, :-1])
        self.assertLess((first - wanted).abs().max(), 1e-4)


class TestRows(CustomTestCase):
    def test_every_label_of_a_lookup_is_its_pair_s_digit_or_the_end(self) -> None:
        from far_lookup_rows import far_lookup_rows, sentence_pool
        from tiny_model_files import ASSISTANT, EOS
        from train_tiny_models import IGNORE

        torch.manual_seed(0)
        sentences, asked = sentence_pool(50, 0), 0
        for length, close in ((128, False), (1024, False), (128, True)):
            ids = torch.zeros(40, length, dtype=torch.int64)
            labels = torch.zeros_like(ids)
            far_lookup_rows(sentences, ids, labels, close)
            for tokens, wanted in zip(ids.tolist(), labels.tolist()):
                pairs = {a: c for a, b, c in zip(tokens, tokens[1:], tokens[2:]) if b == ord("=")}
                self.assertGreaterEqual(len(pairs), 2)
                for i, label in enumerate(wanted):
                    if label == IGNORE:
                        continue
                    self.assertEqual(tokens[i + 1], label)
                    if label != EOS:
                        key = tokens[i - 2] if tokens[i] == ASSISTANT else tokens[i - 1]
                        self.assertEqual(label, pairs[key])
                        asked += 1
        self.assertGreater(asked, 200)


class TestMuon(CustomTestCase):
    def test_updates_have_one_size_in_every_direction(self) -> None:
        """Of a matrix, and of a stack as of its matrices alone; one without a gradient stays."""
        from muon import MOMENTUM, SCALE, Muon

        generator = torch.Generator().manual_seed(0)
        starts = [torch.randn(shape, generator=generator) for shape in ((24, 64), (3, 64, 24), (8, 8))]
        grads = [torch.randn(start.shape, generator=generator) for start in starts[:2]]
        grads[0] *= torch.logspace(-0.4, 0.4, 24).unsqueeze(1)
        params = [torch.nn.Parameter(start.clone()) for start in starts]
        lr = torch.tensor(0.5)
        muon = Muon(params, lr, 0.1)
        for step in range(2):
            before = [param.detach().clone() for param in params]
            for param, grad in zip(params, grads):
                param.grad = grad.clone()
            muon.step()
            self.assertTrue(torch.equal(params[2], starts[2]))
            for param, was, grad in zip(params, before, grads):
                update = (was * (1 - 0.5 * 0.1) - param.detach()) / (0.5 * SCALE * 64**0.5)
                values = torch.linalg.svdvals(update)
                self.assertTrue(((values > 0.5) & (values < 1.3)).all(), (step, values))
                # Same directions as the gradient's own: its momentum points nowhere else here.
                u, _, v = torch.linalg.svd(grad, full_matrices=False)
                self.assertLess((update - u @ v).norm() / (u @ v).norm(), 0.35)
        self.assertTrue(torch.allclose(muon.momenta[params[0]], (1 + MOMENTUM) * grads[0]))


if __name__ == "__main__":
    unittest.main()

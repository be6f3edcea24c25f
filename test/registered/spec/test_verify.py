"""What verification accepts, and how the rows of a path are edited, compared with counting by hand."""

import itertools
import unittest

import torch

from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpecInfo
from sglang.srt.speculative.verify import num_new_tokens
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.draw_truth import both_forms, device_edits
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

VOCAB = 7


def by_hand(drawn: list[int], drafts: list[int]) -> list[int]:
    """The tokens of a step, one after the other: a draft that differs from the sampled token ends it."""
    tokens = []
    for token, draft in zip(drawn, [*drafts, None], strict=True):
        tokens.append(token)
        if token != draft:
            break
    return tokens


class TestNumNewTokens(CustomTestCase):
    def test_every_pattern_of_two_ids(self) -> None:
        for width in (2, 3, 4):
            pairs = list(
                itertools.product(itertools.product((0, 1), repeat=width), itertools.product((0, 1), repeat=width - 1))
            )
            drawn = torch.tensor([pair[0] for pair in pairs])
            drafts = torch.tensor([pair[1] for pair in pairs])
            wanted = [len(by_hand(list(ours), list(theirs))) for ours, theirs in pairs]
            self.assertEqual(num_new_tokens(drawn, drafts).tolist(), wanted)

    def test_an_empty_batch(self) -> None:
        none = torch.empty(0, 3, dtype=torch.int64)
        self.assertEqual(num_new_tokens(none, none[:, :2]).tolist(), [])


class TestAlongPath(CustomTestCase):
    def params(self) -> list[SamplingParams]:
        return [
            SamplingParams(temperature=0.7, top_p=0.9, frequency_penalty=0.5, presence_penalty=-0.25),
            SamplingParams(temperature=0.0, repetition_penalty=1.5),
            SamplingParams(temperature=1.2, top_k=3, min_p=0.1, min_new_tokens=2, logit_bias={"3": 1.5}),
            SamplingParams(temperature=1.0, min_new_tokens=3, stop_token_ids=[5]),
        ]

    def test_each_row_is_edited_as_if_its_drafts_had_been_output(self) -> None:
        generator = torch.Generator().manual_seed(0)
        params = self.params()
        outputs = [[1, 1, 2], [4], [], [6, 0]]
        drafts = torch.tensor([[2, 2, 1], [4, 0, 0], [5, 5, 3], [3, 3, 3]])
        for chosen in ([0, 1, 2, 3], [0], [2], [1, 3]):
            rows = [SamplingRow(params[i], i, [0, 5], outputs[i], [5, 6]) for i in chosen]
            logits = torch.randn(len(chosen) * 4, VOCAB, generator=generator)
            wanted = []
            for place, i in enumerate(chosen):
                for j in range(4):
                    ids = outputs[i] + drafts[i, :j].tolist()
                    alone = SamplingBatchInfo.from_rows(
                        [SamplingRow(params[i], i, [0, 5], ids, [5, 6])], VOCAB, torch.device("cpu")
                    )
                    row = logits[place * 4 + j : place * 4 + j + 1]
                    wanted.append(alone.apply_edits(row) if alone.edits_logits() else row)
            for form, info in both_forms(rows, VOCAB):
                with self.subTest(chosen=chosen, form=form):
                    wide = info.along_path(drafts[chosen])
                    torch.testing.assert_close(wide.apply_edits(logits), torch.cat(wanted))
                    # The batch keeps its own counts, and counts on by itself.
                    info.update(drafts[chosen][:, 0])
                    torch.testing.assert_close(info.apply_edits(logits[1::4]), torch.cat(wanted[1::4]))
                    torch.testing.assert_close(wide.apply_edits(logits), torch.cat(wanted))

    def test_parameters_follow_their_request(self) -> None:
        rows = [SamplingRow(params, seed, (), ()) for seed, params in enumerate(self.params())]
        info = SamplingBatchInfo.from_rows(rows, VOCAB, torch.device("cpu"))
        wide = info.along_path(torch.zeros(4, 2, dtype=torch.int64))
        self.assertEqual(wide.sampling_seed.tolist(), [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3])
        for name in ("temperatures", "top_ps", "top_ks", "min_ps"):
            self.assertEqual(getattr(wide, name)[::3].tolist(), getattr(info, name).tolist(), name)
            self.assertEqual(len(getattr(wide, name)), 12, name)

    def test_the_batch_keeps_its_own_counts(self) -> None:
        edits = device_edits(
            [SamplingRow(SamplingParams(frequency_penalty=1.0, repetition_penalty=2.0), 0, (1,), (2,))], VOCAB
        )
        marks, left = edits.marks.clone(), edits.left.clone()
        edits.along_path(torch.tensor([[3, 4]]))
        self.assertTrue(torch.equal(edits.marks, marks) and torch.equal(edits.left, left))


class TestSpecInfo(CustomTestCase):
    def test_no_steps_are_refused(self) -> None:
        with self.assertRaisesRegex(ValueError, "at least 1"):
            SpecInfo(0)


if __name__ == "__main__":
    unittest.main()

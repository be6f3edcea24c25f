"""Sparse attention at the model's width against float64 over decoded rows: lengths, holes, pages, sinks, splits."""

import os
import sys
import unittest
from unittest import mock

import torch

from sglang.kernels.ops.attention.sparse_attention import sparse_attention, sparse_attention_torch
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases import cases_of
from sglang.test.sparse_cases import assert_near, sparse_inputs, sparse_matrix
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=25, suite="stage-b-test-cpu")

FP8 = torch.float8_e4m3fn


def setUpModule():
    torch.set_num_threads(1)


class TestReference(CustomTestCase):
    """The checks of test_sparse_attention_gpu.py, here for the reference."""

    def test_matrix(self):
        for packed, heads in ((FP8, (1, 16, 64, 128)), (torch.float8_e4m3fnuz, (16,))):
            for case in sparse_matrix(heads, packed):
                with self.subTest(case.name):
                    assert_near(sparse_attention_torch(*case.args), case.truth())

    def test_a_length_of_nothing_gives_zero(self):
        case = sparse_inputs(3, 64, FP8)
        self.assertFalse(bool(sparse_attention(*case.args)[0].any()))


@unittest.skipUnless(os.environ.get("TRITON_INTERPRET") == "1", "run as a program, which interprets Triton")
class TestBodyInterpreted(CustomTestCase):
    """The Triton body in the interpreter, float32: every split gives the same, whatever is masked."""

    def test_splits(self):
        from sglang.kernels.ops.attention.sparse_attention import sparse_attention_triton

        lengths = (0, 1, 129)
        for kind, per_page, chosen in ((FP8, 64, True), (FP8, 2, False), (None, 2, True)):
            case = sparse_inputs(3, per_page, kind, chosen=chosen, dtype=torch.float32, lengths=lengths)
            for splits in (1, 8):
                with self.subTest(case.name, splits=splits):
                    found = sparse_attention_triton(*case.args, splits=splits)
                    torch.testing.assert_close(found.double(), case.truth(), rtol=1e-4, atol=1e-5)

    def test_rows_of_a_chain_are_read_with_their_stride(self):
        from sglang.kernels.ops.attention.sparse_attention import sparse_attention_triton

        q, window, ids, *rest = sparse_inputs(2, 0, None, dtype=torch.float32, lengths=(5, 64, 1, 128)).args
        found = sparse_attention_triton(q[::2], window, ids[::2], *rest)
        torch.testing.assert_close(found, sparse_attention_torch(q, window, ids, *rest)[::2], rtol=1e-4, atol=1e-5)

    def test_a_score_that_is_not_a_number_is_chosen_first(self):
        """It must be visible in the output, as in the reference; minus zero equals zero."""
        from sglang.kernels.ops.attention.select_entries import select_entries_torch, select_entries_triton

        keys = torch.zeros(2 * 64, 16)
        keys[64 + 40], keys[64 + 7] = torch.nan, -1.0
        q, weights = torch.ones(1, 2, 16), torch.tensor([[-1.0, -1.0]])
        args = (q, weights, keys, torch.tensor([[1]], dtype=torch.int32), torch.tensor([0]))
        for visible in (64, 41, 40, 5, 3):
            rest = (torch.tensor([visible], dtype=torch.int32), 64, 4)
            found = select_entries_triton(*args, *rest)
            self.assertEqual(found.tolist(), select_entries_torch(*args, *rest).tolist())
            self.assertEqual(40 in found.tolist()[0], visible > 40)

    def test_scores_of_a_part_at_a_time(self):
        """A context whose scores do not fit is served row by row in the same memory."""
        from sglang.kernels.ops.attention import select_entries as module

        case = next(case for case in cases_of(module.select_entries) if case.name == "scored-packed")
        made = []
        empty = torch.empty

        def counted(*shape, **options):
            made.append(empty(*shape, **options))
            return made[-1]

        with mock.patch.object(module, "SCORE_BYTES", 1), mock.patch.object(torch, "empty", counted):
            found = module.select_entries_triton(*case.args)
        self.assertEqual([one.numel() for one in made if one.dtype == torch.float32], [5 * 4])
        self.assertTrue(torch.equal(found, module.select_entries_torch(*case.args)))

    def test_entries_and_states_at_once(self):
        """One launch if no entry reads what the step writes: decode steps of two requests."""
        from sglang.kernels.ops.attention import compress as module

        case = next(case for case in cases_of(module.compress) if case.name == "none-closed")
        for apart in (True, False):
            args = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in case.args]
            wanted = module.compress_torch(
                *[arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in case.args]
            )
            found = module.compress_triton(*args, None, apart)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other)


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET") != "1":
        # Triton reads it when it is first imported.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    unittest.main()

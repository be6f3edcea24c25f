"""Sparse attention in two passes: numbers by sm_90's instructions, bodies against float64, and which steps take it."""

import os
import sys
import unittest
from unittest import mock

import torch

from sglang.kernels.ops.attention import sparse_passes
from sglang.kernels.ops.attention.sparse_passes_triton import SM90_NUMBERS
from sglang.kernels.ops.attention.sparse_splits import Pass, Passes, choose_passes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.ptx import run_ptx
from sglang.test.sparse_cases import sparse_inputs
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=14, suite="stage-b-test-cpu")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FP8 = torch.float8_e4m3fn
NANS = (0x7F, 0xFF)


class TestNumbersOnSm90(CustomTestCase):
    def test_every_byte_beside_every_exponent(self):
        """Four bytes and an exponent each, by pairs; those that stand for NaN no writer makes."""
        order = torch.randint(0, 256, (512, 4), generator=torch.Generator().manual_seed(1))
        order[:256] = torch.arange(256).unsqueeze(1)
        word = sum(order[:, i] << (8 * i) for i in range(4))
        numbers = order.to(torch.uint8).view(FP8).float()
        for exponent in range(255):
            others = (exponent, (exponent + 100) % 255)
            scales = [torch.tensor(one << 7 | one << 23) for one in others]
            found = run_ptx(SM90_NUMBERS.value, [None, None, word, *scales])
            for place in range(4):
                bits = (found[f"${place // 2}"] >> (16 * (place % 2))) & 0xFFFF
                power = torch.tensor(others[place // 2] << 23, dtype=torch.int32).view(torch.float32)
                wanted = (numbers[:, place] * power).bfloat16()
                known = ~torch.isin(order[:, place], torch.tensor(NANS))
                value = bits.to(torch.int32).to(torch.int16).view(torch.bfloat16)
                self.assertTrue(torch.equal(value[known], wanted[known]), (exponent, place))

    def test_the_exponent_of_nan(self):
        """Its group holds zeros: every number of it is NaN."""
        nan = torch.tensor(0x7F80 | 0x7F80 << 16)
        found = run_ptx(SM90_NUMBERS.value, [None, None, torch.zeros(1, dtype=torch.long), nan, nan])
        for register in ("$0", "$1"):
            bits = found[register].to(torch.int32).view(torch.int16)
            self.assertTrue(bool(bits.view(torch.bfloat16).isnan().all()))


class TestChoice(CustomTestCase):
    def test_steps_that_fill_an_h200(self):
        self.assertIsNone(choose_passes(63, 64, 640, "sm_90"))
        self.assertIsNone(choose_passes(64, 63, 640, "sm_90"))
        self.assertIsNotNone(choose_passes(64, 64, 640, "sm_90"))
        self.assertIsNone(choose_passes(31, 128, 640, "sm_90"))
        self.assertIsNotNone(choose_passes(32, 128, 640, "sm_90"))
        self.assertIsNone(choose_passes(32, 127, 640, "sm_90"))
        for heads in (64, 128):
            blocks = [choose_passes(64, heads, k, "sm_90").logits.block for k in (1, 192, 193, 640)]
            self.assertEqual(blocks, [64, 64, 128, 128])
        for arch in ("gfx942", "gfx950", "cpu"):
            self.assertIsNone(choose_passes(1024, 128, 640, arch))

    def test_caches_that_are_read(self):
        args = sparse_inputs(2, 64, FP8, lengths=(1,)).args
        q, window, scales, entries = args[0], args[1], args[5], args[6]
        self.assertTrue(sparse_passes.fits_passes(q, window, scales, entries))
        self.assertTrue(sparse_passes.fits_passes(q, window, scales, None))
        self.assertFalse(sparse_passes.fits_passes(q.float(), window, scales, entries))
        self.assertFalse(sparse_passes.fits_passes(q, window, None, entries))
        self.assertFalse(sparse_passes.fits_passes(q[..., :256], window, scales, entries))
        self.assertFalse(sparse_passes.fits_passes(q, window, scales[..., :4], entries))
        self.assertFalse(sparse_passes.fits_passes(q, window, scales, entries[..., :512]))


@unittest.skipUnless(INTERPRETED, "run as a program, which interprets Triton")
class TestBodiesInterpreted(CustomTestCase):
    """float32, as the interpreter has no products of bfloat16."""

    passes = Passes(Pass(16, 32, 512, 4, 1), Pass(16, 32, 256, 4, 1))

    def check(self, case):
        found = sparse_passes.attend_in_passes(*case.args, passes=self.passes, packed=False)
        torch.testing.assert_close(found.double(), case.truth(), rtol=1e-3, atol=1e-3)

    def test_holes_lengths_and_heads(self):
        for heads, per_page, chosen, sink in ((3, 64, True, 0.0), (17, 2, False, 30.0)):
            case = sparse_inputs(heads, per_page, FP8, sink, chosen, torch.float32, lengths=(0, 1, 129))
            with self.subTest(case.name):
                self.check(case)

    def test_a_window_alone_and_in_parts(self):
        args = sparse_inputs(2, 0, FP8, dtype=torch.float32, lengths=(5, 0, 33))
        wide = type(args)(args.name, (*args.args, None, None, None, None, None, None, 1), args.attended)
        self.check(wide)
        with mock.patch.object(sparse_passes, "MAX_BETWEEN", 4096):
            self.check(wide)

    def test_rows_of_a_chain_are_read_with_their_stride(self):
        case = sparse_inputs(2, 64, FP8, dtype=torch.float32, lengths=(5, 64, 1))
        q, window, ids, sinks, scale, scales, entries, entry_scales, chosen, table, requests, visible, page = case.args
        found = sparse_passes.attend_in_passes(
            q[::2], window, ids[::2], sinks, scale, scales, entries, entry_scales, chosen[::2], table,
            requests[::2].contiguous(), visible[::2].contiguous(), page, passes=self.passes, packed=False,
        )  # fmt: skip
        torch.testing.assert_close(found.double(), case.truth()[::2], rtol=1e-3, atol=1e-3)


if __name__ == "__main__":
    if not INTERPRETED:
        # Triton reads it when it is first imported.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    unittest.main()

"""A NaN or an infinity at one element of an op's inputs comes out of its reference where it comes out of the truth."""

import itertools
import math
import unittest

import torch
from test_op_parity import TRUTHS, tensors

from sglang.kernels.ops.attention.extend_ragged import causal_attention, logits_may_overflow
from sglang.kernels.registry import REGISTRY
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases import cases_of
from sglang.test.poison import complaint, copy_args, poisons
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

INFINITIES = (math.nan, math.inf, -math.inf)


def true_causal(q, k, v, scale):
    """Float64, one row and one head at a time."""
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    for row, head in itertools.product(range(q.shape[0]), range(q.shape[1])):
        seen, of_head = len(k) - len(q) + row + 1, head * k.shape[1] // q.shape[1]
        probs = (k[:seen, of_head].double() @ q[row, head].double() * scale).softmax(0)
        out[row, head] = probs @ v[:seen, of_head].double()
    return out


class TestCausalAttention(CustomTestCase):
    """torch's fused kernel gives numbers on a CPU for rows without finite logits, in bfloat16 for any infinity."""

    def test_no_number_where_the_truth_has_none(self):
        torch.manual_seed(0)
        for dtype, (new, seen), heads in itertools.product(
            (torch.float32, torch.bfloat16),
            ((1, 1), (1, 40), (3, 3), (2, 5), (17, 17)),
            ((2, 2), (4, 1)),
        ):
            clean = [torch.randn(count, n, 8).to(dtype) for count, n in zip((new, seen, seen), (*heads, heads[1]))]
            for number, value, row in itertools.product(range(3), INFINITIES, (0, -1)):
                parts = [part.clone() for part in clean]
                parts[number][row, -1, 2] = value
                with self.subTest(dtype=dtype, new=new, seen=seen, heads=heads, number=number, value=value, row=row):
                    found, wanted = causal_attention(*parts, 0.35), true_causal(*parts, 0.35)
                    self.assertFalse(bool((found.isfinite() & ~wanted.isfinite()).any()))
                    # Values of later tokens may reach earlier rows of their request, with a probability of 0.
                    if number < 2:
                        self.assertTrue(torch.equal(found.isfinite(), wanted.isfinite()))
                        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
                        kept = [torch.where(wanted.isfinite(), part.double(), 0.0) for part in (found, wanted)]
                        torch.testing.assert_close(*kept, rtol=tolerance, atol=tolerance)

    def test_when_logits_may_overflow(self):
        small = torch.ones(2, 2, 8)
        for q, k, wanted in (
            (small, small, False),
            (small * 1e18, small * 1e18, False),
            (small * 1e19, small * -1e19, True),
            (small * math.nan, small * 0, True),
            (small * 0, small * math.inf, True),
            (small.half() * 6e4, small.half() * -6e4, False),
            (small[:1] * 0, small * 0, False),
        ):
            self.assertIs(logits_may_overflow(q, k), wanted)


class TestReferences(CustomTestCase):
    def test_small_cases_against_the_truth(self):
        REGISTRY.load_all()
        count = 0
        for name, truth in sorted(TRUTHS.items()):
            op = REGISTRY.ops[name]
            cases = [case for case in cases_of(op) if all(size(arg) < 5000 for arg in case.args)]
            for case in sorted(cases, key=lambda case: sum(map(size, case.args)))[:3]:
                clean = tensors(truth(*copy_args(case.args)))
                for poison in poisons(case):
                    args = poison.put(case.args)
                    found, wanted = tensors(op.reference(*copy_args(args))), tensors(truth(*args))
                    with self.subTest(op=name, case=case.name, poison=poison):
                        self.assertIsNone(complaint(found, found, wanted, clean))
                        count += 1
        self.assertGreater(count, 300)


def size(arg):
    return arg.numel() if isinstance(arg, torch.Tensor) else 0


if __name__ == "__main__":
    unittest.main()

"""The ops of hyper-connections against float64 loops over single numbers, and against wrong variants."""

import math
import unittest

import torch

from sglang.kernels.ops.mhc.hc_head import hc_head
from sglang.kernels.ops.mhc.hc_post import hc_post, hc_post_torch
from sglang.kernels.ops.mhc.hc_post_pre import hc_post_pre
from sglang.kernels.ops.mhc.hc_pre import balance, hc_pre
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases import cases_of
from sglang.test.op_cases.mhc import parameters
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

# The references: sglang.kernels.ops.mhc.hc_pre, sglang.kernels.ops.mhc.hc_post, sglang.kernels.ops.mhc.hc_head and
# sglang.kernels.ops.mhc.hc_post_pre.


def tensors(found):
    return [part for part in (found if isinstance(found, tuple) else (found,)) if torch.is_tensor(part)]


def sigmoid(value):
    return 1 / (1 + math.exp(-value)) if not value <= -700 else 0.0


def mixes(token, fn, rms_eps):
    flat = [value for stream in token for value in stream]
    norm = 1 / math.sqrt(sum(value * value for value in flat) / len(flat) + rms_eps)
    return [norm * sum(a * b for a, b in zip(row, flat)) for row in fn]


def sinkhorn(logits, iterations, eps):
    n = len(logits)
    rows = []
    for row in logits:
        powers = [math.exp(value - max(row)) for value in row]
        rows.append([power / sum(powers) + eps for power in powers])
    for step in range(iterations):
        if step:
            rows = [[value / (sum(row) + eps) for value in row] for row in rows]
        sums = [sum(rows[j][k] for j in range(n)) + eps for k in range(n)]
        rows = [[value / sums[k] for k, value in enumerate(row)] for row in rows]
    return rows


def weighted(token, weights):
    return [sum(w * stream[c] for w, stream in zip(weights, token)) for c in range(len(token[0]))]


def true_pre(x, fn, base, scale, rms_eps, hc_eps, iterations):
    n, (fn, base, scale) = x.shape[1], (part.double().tolist() for part in (fn, base, scale))
    rows, posts, combs = [], [], []
    for token in x.double().tolist():
        z = mixes(token, fn, rms_eps)
        rows.append(weighted(token, [sigmoid(z[j] * scale[0] + base[j]) + hc_eps for j in range(n)]))
        posts.append([2 * sigmoid(z[n + j] * scale[1] + base[n + j]) for j in range(n)])
        at = [[2 * n + n * j + k for k in range(n)] for j in range(n)]
        combs.append(sinkhorn([[z[i] * scale[2] + base[i] for i in row] for row in at], iterations, hc_eps))
    shapes = (x.shape[0], x.shape[2]), (x.shape[0], n), (x.shape[0], n, n)
    return [torch.tensor(part).double().view(shape) for part, shape in zip((rows, posts, combs), shapes)]


def true_post(row, x, post, comb):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for k in range(x.shape[1]):
            out[token, k] = post[token, k].double() * row[token].double()
            for j in range(x.shape[1]):
                out[token, k] += comb[token, j, k].double() * x[token, j].double()
    return out


def true_head(x, fn, base, scale, rms_eps, hc_eps):
    fn, base, scale = (part.double().tolist() for part in (fn, base, scale))
    rows = []
    for token in x.double().tolist():
        z = mixes(token, fn, rms_eps)
        rows.append(weighted(token, [sigmoid(z[j] * scale[0] + base[j]) + hc_eps for j in range(x.shape[1])]))
    return torch.tensor(rows).double().view(x.shape[0], x.shape[2])


def true_post_pre(row, x, post, comb, fn, base, scale, rms_eps, hc_eps, iterations, gain=None, norm_eps=0.0):
    streams = true_post(row, x, post, comb)
    row, post, comb = true_pre(streams, fn, base, scale, rms_eps, hc_eps, iterations)
    for token in row if gain is not None else ():
        token *= gain.double() / math.sqrt(sum(value * value for value in token.tolist()) / len(token) + norm_eps)
    return [streams, row, post, comb]


class TestHyperConnections(CustomTestCase):
    def check(self, op, truth, impls=None):
        for case in cases_of(op):
            wanted = truth(*case.args)
            wanted = wanted if isinstance(wanted, list) else [wanted]
            for impl in impls or op.impls[-1:]:
                with self.subTest(op=op.name, impl=impl.name, case=case.name):
                    found = impl.fn(*case.args)
                    found = tensors(found)
                    for part, of_truth in zip(found, wanted, strict=True):
                        torch.testing.assert_close(part.double(), of_truth, rtol=1e-4, atol=2e-5, equal_nan=True)

    def test_pre(self):
        self.check(hc_pre, true_pre)

    def test_post(self):
        self.check(hc_post, true_post)

    def test_head(self):
        self.check(hc_head, true_head)

    def test_post_pre(self):
        self.check(hc_post_pre, true_post_pre)
        self.assertEqual({hc_post_pre.reference(*case.args)[4] for case in cases_of(hc_post_pre)}, {True, False})

    def test_streams_that_are_one_row(self):
        """Input of the first layer: four equal streams."""
        generator = torch.Generator().manual_seed(2)
        row = torch.randn(5, 64, generator=generator)
        fn, base = parameters(4, 64, 24, generator)
        args = (fn, base, torch.ones(3), 1e-6, 1e-6, 20)
        seen = row[:, None].expand(-1, 4, -1)
        self.assertTrue(hc_pre.impls[0].accepts(seen, *args))
        for part, wanted in zip(hc_pre(seen, *args), hc_pre(seen.contiguous(), *args), strict=True):
            self.assertTrue(torch.equal(part, wanted))

    def test_sixteen_bits_in_the_streams_alone(self):
        """Coefficients are float32 whatever the streams are, and the streams are rounded once."""
        for op in (hc_pre, hc_post, hc_head):
            for case in cases_of(op):
                x = 1 if op is hc_post else 0
                args = [a.bfloat16() if i <= x and torch.is_tensor(a) else a for i, a in enumerate(case.args)]
                found = op.reference(*args)
                wide = op.reference(*(a.float() if torch.is_tensor(a) else a for a in args))
                found, wide = (out if isinstance(out, tuple) else (out,) for out in (found, wide))
                self.assertTrue(torch.equal(found[0], wide[0].bfloat16()), case.name)
                for part, of_wide in zip(found[1:], wide[1:], strict=True):
                    self.assertEqual(part.dtype, torch.float32)
                    self.assertTrue(torch.equal(part, of_wide), case.name)

    def test_what_is_close_is_not_the_same(self):
        """The direction of the sum, and the number and the order of the steps."""
        generator = torch.Generator().manual_seed(1)
        x, row = torch.randn(9, 4, 8, generator=generator), torch.randn(9, 8, generator=generator)
        logits = torch.randn(9, 4, 4, generator=generator) * 3
        comb, post = balance(logits, 20, 1e-6), torch.rand(9, 4, generator=generator)
        right = hc_post_torch(row, x, post, comb)
        self.assertGreater((right - hc_post_torch(row, x, post, comb.transpose(1, 2))).abs().max().item(), 0.1)
        self.assertGreater((comb - balance(logits, 10, 1e-6)).abs().max().item(), 1e-4)
        self.assertGreater((comb - balance(logits.transpose(1, 2), 20, 1e-6).transpose(1, 2)).abs().max().item(), 1e-4)
        # The last step is over columns, so they are nearer to 1 than rows.
        columns, rows = ((comb.sum(dim) - 1).abs().max().item() for dim in (1, 2))
        self.assertLess(columns, 5e-6)
        self.assertLess(columns, rows)


if __name__ == "__main__":
    unittest.main()

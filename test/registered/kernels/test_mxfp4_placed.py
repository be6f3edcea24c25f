"""Experts in MXFP4 with placed codes, interpreted: granules, the product transposed, blocks of one expert's pairs.

The interpreter has no inline assembly: codes become numbers by plain operations here, and test_mxfp4.py runs the
assembly of every code.
"""

import os
import sys
import unittest
from unittest import mock

import torch
import triton
import triton.language as tl

from sglang.kernels.ops.moe import fused_experts_mxfp4_triton as bodies
from sglang.kernels.ops.moe.fused_experts import order_pairs, weighted_sum
from sglang.kernels.ops.moe.fused_experts_mxfp4 import (
    fused_experts_mxfp4_torch,
    mxfp4_product,
    place_experts,
    random_experts,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=14, suite="stage-b-test-cpu")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _number(bits, factor, SIGN: tl.constexpr, LOW: tl.constexpr):
    size = ((bits >> LOW) & 7) << 22
    return (size | (((bits >> SIGN) & 1) << 31)).to(tl.float32, bitcast=True) * 8.507059173023462e37 * factor  # 2^126


@triton.jit
def plain_numbers(w, scale, dtype, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    bits = tl.reshape(w.to(tl.int32), (BLOCK_N, BLOCK_K // 128, 4, 4, 2))
    # 2^-62 of the scale.
    factor = ((scale.to(tl.int32) - 62) << 23).to(tl.float32, bitcast=True)
    factor = tl.reshape(factor, (BLOCK_N, BLOCK_K // 128, 1, 4, 1))
    first, second = _number(bits, factor, 15, 6), _number(bits, factor, 12, 3)
    third, fourth = _number(bits, factor, 14, 0), _number(bits, factor, 13, 9)
    numbers = tl.join(tl.join(first, third), tl.join(second, fourth))
    return tl.reshape(tl.permute(numbers, (0, 1, 3, 5, 6, 2, 4)), (BLOCK_N, BLOCK_K)).to(dtype)


@unittest.skipUnless(INTERPRETED, "run as a program, which interprets Triton")
class TestPlacedExpertsInterpreted(CustomTestCase):
    """float32, as the interpreter has no products of bfloat16."""

    def check(self, hidden, width, tokens, block_k, limit=None, many=False):
        generator = torch.Generator().manual_seed(12)
        stacks = [*random_experts(3, 2 * width, hidden, generator), *random_experts(3, hidden, width, generator)]
        x, weights = torch.randn(tokens, hidden, generator=generator), torch.rand(tokens, 2, generator=generator)
        ids = torch.randint(0, 3, (tokens, 2), generator=generator, dtype=torch.int32)
        ids[:, 0], ids[1::3, 1] = 1, -1
        wanted = fused_experts_mxfp4_torch(x, *stacks, weights, ids, limit)
        self.assertTrue(place_experts(*stacks))
        w13, w13_scale, w2, w2_scale = stacks
        order = order_pairs(ids, 3, 16) if many else None
        tile = {"BLOCK_N": 64, "BLOCK_K": block_k} | ({"GROUP_M": 1} if many else {})
        with mock.patch.object(bodies, "_placed_numbers", plain_numbers):
            rows = mxfp4_product(x, w13, w13_scale, ids, order, tile, 16, True, False, True, limit)
            rows = mxfp4_product(rows, w2, w2_scale, ids, order, tile, 16, False, False, True)
        found = weighted_sum(rows, weights, ids)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)

    def test_more_pairs_of_one_expert_than_a_block_has(self):
        self.check(128, 128, 20, 128)

    def test_a_step_past_the_last_column_and_a_clamp(self):
        self.check(384, 128, 3, 256, limit=0.5)

    def test_ordered_pairs(self):
        self.check(128, 256, 20, 128, many=True)


if __name__ == "__main__":
    if not INTERPRETED:
        # Triton reads it when it is first imported.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "TRITON_INTERPRET": "1"})
    unittest.main()

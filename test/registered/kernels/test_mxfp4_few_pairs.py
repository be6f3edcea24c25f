"""The kernel of few pairs per MXFP4 expert for sm_90, which Triton's interpreter does not know: on the CPU against the
reference. The inline assembly is plain operations here; test_mxfp4.py runs it for every code."""

from __future__ import annotations

import unittest
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch

from sglang.kernels.ops.moe import fused_experts_mxfp4 as experts
from sglang.kernels.ops.moe import fused_experts_mxfp4_sm90_triton as bodies
from sglang.kernels.ops.quant.mxfp4 import PLACES
from sglang.kernels.registry import REGISTRY
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.gluon_on_cpu import OnHost, check_without_gluon, order_on_host
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=10, suite="stage-b-test-cpu")


def numbers(quads, power):
    factor = (power.int() << 16).view(torch.float32)
    for sign, low in PLACES:
        bits = (quads >> low & 7) << 22 | (quads >> sign & 1) << 31
        yield (bits.view(torch.float32) * factor).bfloat16()


class Counted(OnHost):
    """Counts the products of each launch: one per split of words into halves."""

    def __init__(self):
        super().__init__(bodies.few_pairs_mxfp4_kernel)
        self.products = Counter()

    def halves(self, words):
        self.products[len(self.launched)] += 1
        return torch.stack((words & 0xFFFF, words >> 16 & 0xFFFF), -1)


def weighted_sum_on_host(rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    rows = rows.view(*ids.shape, -1).float().masked_fill((ids < 0)[:, :, None], 0.0)
    return (rows * weights[:, :, None]).sum(1)


class TestFewPairs(CustomTestCase):
    def setUp(self):
        self.kernel = Counted()
        for module, name, value in (
            (bodies, "_halves", self.kernel.halves),
            (bodies, "_numbers", numbers),
            (bodies, "few_pairs_mxfp4_kernel", self.kernel),
            (experts, "order_pairs", order_on_host),
            (experts, "weighted_sum", weighted_sum_on_host),
            (experts, "current_platform", SimpleNamespace(arch="sm_90")),
        ):
            self.enterContext(mock.patch.object(module, name, value))

    def check(self, hidden, width, tokens, top_k=2, num_experts=3, limit=None, change=lambda ids: ids):
        """A token with a NaN must get NaN, and no other."""
        generator = torch.Generator().manual_seed(12)
        stacks = [
            *experts.random_experts(num_experts, 2 * width, hidden, generator),
            *experts.random_experts(num_experts, hidden, width, generator),
        ]
        x = torch.randn(tokens, hidden, generator=generator).bfloat16()
        x[tokens // 2, hidden // 3] = float("nan")
        weights = torch.rand(tokens, top_k, generator=generator)
        ids = change(torch.randint(0, num_experts, (tokens, top_k), generator=generator, dtype=torch.int32))
        wanted = experts.fused_experts_mxfp4_torch(x, *stacks, weights, ids, limit)
        self.assertTrue(experts.place_experts(*stacks))
        found = experts.run_mxfp4(x, *stacks, weights, ids, limit, scaled=False)
        self.assertEqual(found.isnan().any(1).tolist(), [token == tokens // 2 for token in range(tokens)])
        largest = float(wanted.float().nan_to_num().abs().max())
        torch.testing.assert_close(found, wanted.float(), rtol=2**-7, atol=2**-7 * largest, equal_nan=True)
        (warps, options), (warps_2, _) = self.kernel.launched
        rows, rows_2 = 16 * warps, 16 * warps_2
        counts = ids[ids >= 0].bincount().tolist()
        blocks = sum(-(-count // 8) for count in counts)
        self.assertEqual(
            self.kernel.products[0], blocks * (width // rows) * (hidden // 128) * 2, "blocks are multiplied once"
        )
        self.assertEqual(self.kernel.products[1], blocks * (hidden // rows_2) * (width // 128))
        return options["HELD"] > 0

    def test_more_pairs_of_one_expert_than_a_block_has(self):
        def change(ids):
            ids[:, 0], ids[1::3, 1] = 1, -1
            return ids

        self.assertTrue(self.check(896, 128, 10, change=change))

    def test_one_token_with_fewer_steps_than_stages(self):
        self.assertTrue(self.check(128, 128, 1, limit=0.5))

    def test_ordered_pairs_and_experts_of_nobody(self):
        self.assertFalse(self.check(256, 128, 18, num_experts=9, limit=0.5))

    def test_rows_that_begin_at_eight_bytes(self):
        generator = torch.Generator().manual_seed(3)
        stacks = [*experts.random_experts(2, 256, 128, generator), *experts.random_experts(2, 128, 128, generator)]
        experts.place_experts(*stacks)
        weights, ids = torch.ones(3, 1), torch.tensor([[0], [1], [0]], dtype=torch.int32)
        rows = torch.randn(3 * 136 + 4, generator=generator).bfloat16()
        found = []
        for x in (rows[4:].view(3, 136)[:, :128], rows[4:].view(3, 136)[:, :128].contiguous()):
            with mock.patch.object(experts, "mxfp4_product", side_effect=experts.mxfp4_product) as product:
                found.append(experts.run_mxfp4(x, *stacks, weights, ids, None, scaled=False))
            given = product.call_args_list[0].args[0]
            self.assertEqual((given.data_ptr() % 16, given.stride(0) % 16), (0, 0))
        self.assertTrue(torch.equal(*found))


class TestWhenItRuns(CustomTestCase):
    def test_without_the_language_codes_stay(self):
        generator = torch.Generator().manual_seed(3)
        stacks = [*experts.random_experts(2, 256, 128, generator), *experts.random_experts(2, 128, 128, generator)]
        chosen = mock.patch.object(REGISTRY, "chosen", return_value="triton")
        platform = mock.patch.object(experts, "current_platform", SimpleNamespace(arch="sm_90"))
        with chosen, platform:
            check_without_gluon(self, bodies, lambda: experts.shuffle_experts_mxfp4(*stacks))
            self.assertFalse(experts.is_placed(stacks[0]))
            self.assertTrue(experts.shuffle_experts_mxfp4(*stacks))


if __name__ == "__main__":
    unittest.main()

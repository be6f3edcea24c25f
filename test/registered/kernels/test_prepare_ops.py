"""The ops between attention's projections and its kernels, against float64 loops and the ops they replace."""

import unittest

import torch
from test_op_parity import clone, true_gemma, true_rms_norm, true_rotary

import sglang.kernels.ops.attention.prepare_gqa as prepare_gqa
import sglang.kernels.ops.attention.prepare_mla as prepare_mla
from sglang.kernels.ops.attention.kv_cache import write_kv
from sglang.kernels.ops.norm.rmsnorm import rms_norm
from sglang.kernels.ops.rope.rotary import rotary
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases import cases_of
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)


class TestPrepare(CustomTestCase):
    def assert_rows(self, cache, before, slots, wanted):
        """``cache`` holds ``wanted`` at ``slots`` and what it held before everywhere else."""
        if cache.dtype == torch.float8_e4m3fn:
            cache, before = cache.float(), before.float()
            torch.testing.assert_close(cache[slots].double(), wanted.double(), rtol=2**-4, atol=2**-9)
        else:
            close(cache[slots], wanted)
        others = sorted(set(range(cache.shape[0])) - set(slots.tolist()))
        self.assertTrue(torch.equal(cache[others], before[others]))

    def test_latent_attention_against_the_truth(self):
        for case in cases_of(prepare_mla.prepare_mla):
            with self.subTest(case.name):
                q, kv_a, positions, table, weight, cache, slots, eps, is_neox, *placed = args = clone(case.args)
                before = clone(args)
                out = prepare_mla.prepare_mla_torch(*args)
                self.assertIs(out, placed[0] if placed else q)
                rope = table.shape[1]
                rank = kv_a.shape[1] - rope
                q_pe, k_pe = true_rotary(positions, before[0][..., -rope:], before[1][:, None, rank:], table, is_neox)
                close(out[..., -rope:], q_pe)
                untouched = before[9] if placed else before[0]
                if len(placed) == 2:
                    w_kc = placed[1].double()
                    nope = before[0][..., : w_kc.shape[1]].double()
                    close(out[..., :-rope], torch.einsum("nhd,hdr->nhr", nope, w_kc))
                else:
                    self.assertTrue(torch.equal(out[..., :-rope], untouched[..., :-rope]))
                self.assertTrue(torch.equal(kv_a, before[1]))
                row = torch.cat((true_rms_norm(before[1][:, :rank], weight, eps), k_pe[:, 0]), dim=-1)
                self.assert_rows(cache, before[5], slots, row)

    def test_grouped_heads_against_the_truth(self):
        for case in cases_of(prepare_gqa.prepare_gqa):
            with self.subTest(case.name):
                q, k, v, q_weight, k_weight, positions, table, *_, slots, eps, is_neox = args = clone(case.args)
                out = prepare_gqa.prepare_gqa_torch(*args)
                normed = true_gemma(q, q_weight, eps), true_gemma(k, k_weight, eps)
                queries, keys = true_rotary(positions, *normed, table, is_neox)
                close(out, queries)
                self.assert_rows(args[7], case.args[7], slots, keys)
                self.assert_rows(args[8], case.args[8], slots, v)

    def test_bits_are_those_of_the_separate_ops(self):
        for dtype in (torch.float32, torch.bfloat16):
            for case in cases_of(prepare_mla.prepare_mla):
                q, kv_a, positions, table, weight, cache, slots, eps, is_neox, *placed = _as(case.args, dtype)
                rope, own = table.shape[1], cache.clone()
                q_pe, k_pe = rotary(positions, q[..., -rope:], kv_a[:, None, -rope:], table, is_neox)
                row = torch.cat((rms_norm(kv_a[:, :-rope], weight, eps), k_pe.squeeze(1)), dim=-1)
                own.view(torch.uint8)[slots] = row.to(own.dtype).view(torch.uint8)
                found = prepare_mla.prepare_mla(q, kv_a, positions, table, weight, cache, slots, eps, is_neox, *placed)
                self.assertTrue(torch.equal(found[..., -rope:], q_pe) and torch.equal(cache, own), case.name)
            for case in cases_of(prepare_gqa.prepare_gqa):
                args = _as(case.args, dtype)
                q, k, v, q_weight, k_weight, positions, table, *caches, slots, eps, is_neox = args
                own = clone(caches)
                normed = rms_norm(q, q_weight, eps, True), rms_norm(k, k_weight, eps, True)
                queries, keys = rotary(positions, *normed, table, is_neox)
                write_kv(keys, v, *own, slots)
                found = prepare_gqa.prepare_gqa(*args)
                self.assertTrue(torch.equal(found, queries), case.name)
                self.assertTrue(all(map(torch.equal, caches, own)), case.name)


def _as(args, dtype):
    """The arguments of a case with floats of ``dtype``; the table of angles, which has no more than 32 rows of few
    columns in the cases, stays float32."""
    return [
        arg.to(dtype) if isinstance(arg, torch.Tensor) and arg.dtype == torch.float32 and arg.shape[0] != 32 else arg
        for arg in clone(args)
    ]


if __name__ == "__main__":
    unittest.main()

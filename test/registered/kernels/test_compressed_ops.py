"""Ops of compressed attention against loops in float64: one entry, one row and one head at a time."""

import math
import unittest
from unittest import mock

import torch

from sglang.kernels.ops.attention import compress as compress_module
from sglang.kernels.ops.attention.compress import compress
from sglang.kernels.ops.attention.prepare_compressed import prepare_compressed
from sglang.kernels.ops.attention.select_entries import select_entries
from sglang.kernels.ops.attention.sparse_attention import sparse_attention
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases import cases_of
from sglang.test.packed_truth import true_rows
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")


def softmax(values):
    top = max(values)
    exps = [math.exp(value - top) for value in values]
    return [value / sum(exps) for value in exps]


def true_entry(kv, gate, kv_states, gate_states, sources, bias, weight, eps, cos_sin):
    ratio, dim = bias.shape[0], weight.shape[0]
    out = torch.zeros(dim, dtype=torch.float64)
    for channel in range(dim):
        values, gates = [], []
        for place, source in enumerate(sources.tolist()):
            if source == -1:
                continue
            column = channel + place // ratio * dim
            row, (of_kv, of_gate) = source, (kv, gate)
            if source < 0:
                row, (of_kv, of_gate) = -2 - source, (kv_states, gate_states)
            values.append(float(of_kv[row, column]))
            gates.append(float(of_gate[row, column]) + float(bias[place % ratio, column]))
        if values:
            out[channel] = sum(w * v for w, v in zip(softmax(gates), values))
    out = out / math.sqrt(float(out @ out) / dim + eps) * weight.double()
    return true_turn(out, cos_sin)


def true_turn(row, cos_sin):
    """The last columns of a row, one pair at a time."""
    out, half = row.clone(), cos_sin.shape[0] // 2
    for i in range(half):
        at = len(row) - 2 * half + 2 * i
        turned = complex(row[at], row[at + 1]) * complex(cos_sin[i], cos_sin[half + i])
        out[at], out[at + 1] = turned.real, turned.imag
    return out


class TestPrepare(CustomTestCase):
    def test_against_loops(self):
        """Each head, and the row that is stored; other rows of the cache stay 0."""
        for case in cases_of(prepare_compressed):
            q, kv, positions, table, weight, eps, ids, cache, *scales = case.args
            cache, scales = cache.clone(), [scale.clone() for scale in scales]
            found = prepare_compressed(*case.args[:7], cache, *scales)
            stored = true_rows(cache, scales[0] if scales else None, kv.shape[1])
            wanted = torch.zeros_like(stored)
            for row in range(q.shape[0]):
                cos_sin = table[int(positions[row])]
                for head in range(q.shape[1]):
                    query = q[row, head].double()
                    query = query / math.sqrt(float(query @ query) / len(query) + eps)
                    torch.testing.assert_close(
                        found[row, head].double(), true_turn(query, cos_sin), rtol=1e-5, atol=1e-5
                    )
                latent = kv[row].double()
                latent = latent / math.sqrt(float(latent @ latent) / len(latent) + eps) * weight.double()
                wanted[ids[row]] = true_turn(latent, cos_sin)
            with self.subTest(case.name):
                error = {"rtol": 0.07, "atol": 1e-2} if scales else {"rtol": 1e-5, "atol": 1e-5}
                torch.testing.assert_close(stored, wanted, **error)


class TestCompress(CustomTestCase):
    def test_against_loops(self):
        for case in cases_of(compress):
            kv, gate, kv_states, gate_states, state_rows, sources, bias, weight, eps, table, *rest = case.args
            first, rows, cache, *scales = rest
            is_packed = bool(scales)
            wanted = true_rows(cache, scales[0] if scales else None, len(weight))
            for i, row in enumerate(rows.tolist()):
                cos_sin = table[int(first[i])]
                wanted[row] = true_entry(kv, gate, kv_states, gate_states, sources[i], bias, weight, eps, cos_sin)
            new = kv_states.clone(), gate_states.clone()
            new[0][state_rows], new[1][state_rows] = kv, gate
            for budget in (compress_module.GATHER_BYTES, 1):
                args = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in case.args]
                with self.subTest(case.name, budget=budget), mock.patch.object(compress_module, "GATHER_BYTES", budget):
                    found = compress(*args)
                    stored = true_rows(found[0], args[13] if is_packed else None, len(weight))
                    error = {"rtol": 0.07, "atol": 1e-3} if is_packed else {"rtol": 1e-5, "atol": 1e-5}
                    torch.testing.assert_close(stored, wanted, **error)
                    self.assertTrue(torch.equal(found[1], new[0]) and torch.equal(found[2], new[1]))
                    self.assertEqual([one.data_ptr() for one in found], [args[i].data_ptr() for i in (12, 2, 3)])

    def test_states_are_read_before_they_are_written(self):
        """A row of the states that the step overwrites is part of an entry that the step closes."""
        case = next(case for case in cases_of(compress) if case.name == "across")
        wanted = compress.reference(*[arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in case.args])[0]
        args = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in case.args]
        args[4] = torch.arange(5, 14)
        self.assertTrue(torch.equal(compress(*args)[0], wanted))

    def test_softmax_is_per_channel_and_the_oldest_half_comes_from_the_first_columns(self):
        """One token of the window before outweighs all others in only one channel."""
        kv, gate = torch.zeros(8, 4), torch.zeros(8, 4)
        kv[1, :2], kv[5, 2:] = torch.tensor([3.0, 5.0]), torch.tensor([7.0, 9.0])
        gate[1, 0], gate[5, 3] = 1e4, 1e4
        states = torch.zeros(9, 4), torch.zeros(9, 4)
        ones, table = torch.ones(2), torch.tensor([[1.0, 0.0]])
        cache = torch.zeros(2, 2)
        sources = torch.arange(8).unsqueeze(0)
        none = torch.zeros(8, dtype=torch.int64)
        out = compress(
            kv, gate, *states, none, sources, torch.zeros(4, 4), ones, 0.0, table, none[:1], none[:1] + 1, cache
        )[0][1]
        # Channel 0: token 1 alone, 3. Channel 1: token 5 alone, 9. The norm divides by the root of 45.
        torch.testing.assert_close(out, torch.tensor([3.0, 9.0]) / math.sqrt(45))


class TestSelect(CustomTestCase):
    def test_against_loops(self):
        equal_scores = 0
        for case in cases_of(select_entries):
            q, weights, keys, table, requests, visible, per_page, top_k, *scales = case.args
            keys = true_rows(keys, scales[0] if scales else None, q.shape[2])
            found = select_entries(*case.args)
            self.assertEqual((found.dtype, found.shape[1]), (torch.int32, min(top_k, table.shape[1] * per_page)))
            for row in range(q.shape[0]):
                scores = []
                for entry in range(int(visible[row])):
                    page = int(table[int(requests[row]), entry // per_page])
                    key = keys[page * per_page + entry % per_page].double()
                    heads = zip(q[row].double(), weights[row].double())
                    scores.append(sum(float(w) * max(0.0, float(head @ key)) for head, w in heads))
                equal_scores += len(scores) - len(set(scores))
                best = sorted(range(len(scores)), key=lambda entry: (-scores[entry], entry))[:top_k]
                with self.subTest(case.name, row=row):
                    self.assertEqual([entry for entry in found[row].tolist() if entry >= 0], sorted(best))
                    self.assertEqual(found[row, len(best) :].tolist(), [-1] * (found.shape[1] - len(best)))
        self.assertGreater(equal_scores, 20)

    def test_parts_of_a_step_choose_alike(self):
        case = next(case for case in cases_of(select_entries) if case.name == "scored")
        with mock.patch("sglang.kernels.ops.attention.select_entries.GATHER_BYTES", 1):
            parts = select_entries(*case.args)
        self.assertTrue(torch.equal(parts, select_entries(*case.args)))


class TestSparseAttention(CustomTestCase):
    def test_against_loops(self):
        for case in cases_of(sparse_attention):
            q, window, window_rows, sinks, scale, of_window, *rest = (*case.args, *[None] * (13 - len(case.args)))
            entries, of_entries, chosen, table, requests, visible, per_page = rest
            dim = q.shape[2]
            window = true_rows(window, of_window, dim)
            entries = None if entries is None else true_rows(entries, of_entries, dim)
            for budget in (compress_module.GATHER_BYTES, 1):
                with mock.patch("sglang.kernels.ops.attention.sparse_attention.GATHER_BYTES", budget):
                    found = sparse_attention(*case.args)
                for row in range(q.shape[0]):
                    seen = [window[i].double() for i in window_rows[row].tolist() if i >= 0]
                    if entries is not None:
                        numbers = range(int(visible[row])) if chosen is None else chosen[row, : int(visible[row])]
                        for number in (int(one) for one in numbers if one >= 0):
                            page = int(table[int(requests[row]), number // per_page])
                            seen.append(entries[page * per_page + number % per_page].double())
                    for head in range(q.shape[1]):
                        scores = [float(q[row, head].double() @ one) * scale for one in seen]
                        *weights, _ = softmax([*scores, float(sinks[head])])
                        nothing = torch.zeros(dim, dtype=torch.float64)
                        wanted = sum((w * one for w, one in zip(weights, seen)), nothing)
                        torch.testing.assert_close(found[row, head].double(), wanted, rtol=1e-5, atol=1e-5)

    def test_no_row_is_no_output(self):
        q = torch.randn(2, 3, 8)
        nothing = torch.full((2, 4), -1)
        out = sparse_attention(q, torch.full((5, 8), torch.nan), nothing, torch.zeros(3), 1.0)
        self.assertFalse(bool(out.any()))

    def test_bfloat16_is_rounded_once(self):
        case = next(case for case in cases_of(sparse_attention) if case.name == "chosen")
        low = [
            arg.bfloat16() if isinstance(arg, torch.Tensor) and arg.dtype == torch.float32 and arg.dim() > 1 else arg
            for arg in case.args
        ]
        high = [arg.float() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg for arg in low]
        self.assertTrue(torch.equal(sparse_attention(*low), sparse_attention(*high).bfloat16()))


if __name__ == "__main__":
    unittest.main()

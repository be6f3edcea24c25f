"""Gated-delta-net ops against a float64 recurrence written token by token from the formulas."""

import math
import unittest

import torch

from sglang.kernels.ops.gdn.chunk import CHUNK_SIZE, chunk_gated_delta_rule, chunk_table
from sglang.kernels.ops.gdn.decode_step import gdn_decode_step
from sglang.kernels.ops.gdn.extend_step import gdn_extend_step
from sglang.kernels.ops.gdn.reference import (
    causal_conv1d,
    causal_conv1d_update,
    gdn_gating,
    l2_norm,
    recurrent_gated_delta_rule,
)
from sglang.kernels.ops.gdn.verify_step import gdn_verify_step
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases import cases_of
from sglang.test.op_cases.gdn import step_inputs
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

LENGTHS = (0, 1, 2, 3, 63, 64, 65, 130)
SHAPES = ((2, 1, 16, 16), (2, 2, 16, 24), (1, 3, 24, 16))  # key heads, value heads a key head, K, V


def true_conv(x, weight, history):
    """SiLU of the causal sums, one token and one tap at a time; returns the outputs and the last W-1 columns."""
    width = weight.shape[1]
    columns = [history[:, j].double() for j in range(width - 1)]
    outputs = []
    for row in x.double():
        columns.append(row)
        total = sum(columns[len(columns) - width + j] * weight[:, j].double() for j in range(width))
        outputs.append(total / (1 + torch.exp(-total)))
    out = torch.stack(outputs) if outputs else x.double()
    return out, torch.stack(columns[len(columns) - width + 1 :], dim=1)


def true_recurrence(q, k, v, g, beta, state, scale):
    """The delta rule for one sequence, head by head and token by token; state is [HV, V, K]."""
    per_key = v.shape[1] // k.shape[1]
    state = state.double().clone()
    out = torch.zeros(v.shape, dtype=torch.float64)
    for t in range(v.shape[0]):
        for head in range(v.shape[1]):
            key, query = k[t, head // per_key].double(), q[t, head // per_key].double() * scale
            decayed = state[head] * math.exp(float(g[t, head]))
            error = v[t, head].double() - decayed @ key
            state[head] = decayed + float(beta[t, head]) * torch.outer(error, key)
            out[t, head] = state[head] @ query
    return out, state


def true_mixer(args, slot, rows):
    """A sequence's rows through the whole mixer, formula by formula: outputs, columns and state of ``slot`` after."""
    mixed, z, b, a, weight, A_log, dt_bias, norm_weight, columns, states = (x.double() for x in args[:10])
    heads, v_dim, k_dim = states.shape[1:]
    key_heads = (mixed.shape[1] - heads * v_dim) // (2 * k_dim)
    convolved, last = true_conv(mixed[rows], weight, columns[slot])
    q, k = (x.unflatten(-1, (key_heads, k_dim)) for x in convolved[:, : 2 * key_heads * k_dim].chunk(2, dim=-1))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    v = convolved[:, 2 * key_heads * k_dim :].unflatten(-1, (heads, v_dim))
    g = -A_log.exp() * torch.log1p((a[rows] + dt_bias).exp())
    beta = 1 / (1 + torch.exp(-b[rows]))
    out, state = true_recurrence(q, k, v, g, beta, states[slot], k_dim**-0.5)
    normed = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm_weight
    return normed * z[rows] / (1 + torch.exp(-z[rows])), last, state


def random_inputs(num_tokens, shape, seed, strongest=3.0):
    generator = torch.Generator().manual_seed(seed)
    key_heads, per_key, k_dim, v_dim = shape
    heads = key_heads * per_key
    q, k = l2_norm(torch.randn(2, num_tokens, key_heads, k_dim, generator=generator))
    v = torch.randn(num_tokens, heads, v_dim, generator=generator)
    g = -(torch.rand(num_tokens, heads, generator=generator) ** 4) * strongest
    beta = torch.rand(num_tokens, heads, generator=generator)
    return [q, k, v, g, beta], torch.randn(heads, v_dim, k_dim, generator=generator)


class TestCausalConv1d(CustomTestCase):
    def test_packed_lengths_match_token_by_token(self):
        generator = torch.Generator().manual_seed(1)
        for width in (2, 4):
            x = torch.randn(sum(LENGTHS), 12, generator=generator)
            weight = torch.randn(12, width, generator=generator)
            history = torch.randn(len(LENGTHS), 12, width - 1, generator=generator)
            out, final = causal_conv1d(x, weight, history, list(LENGTHS))
            for i, own in enumerate(x.split(list(LENGTHS))):
                start = sum(LENGTHS[:i])
                expected, columns = true_conv(own, weight, history[i])
                torch.testing.assert_close(out[start : start + LENGTHS[i]].double(), expected, atol=1e-5, rtol=1e-5)
                self.assertTrue(torch.equal(final[i].double(), columns), f"columns of length {LENGTHS[i]}")

    def test_continuation_equals_one_pass(self):
        generator = torch.Generator().manual_seed(2)
        x, weight = torch.randn(20, 6, generator=generator), torch.randn(6, 4, generator=generator)
        whole, last = causal_conv1d(x, weight, torch.zeros(1, 6, 3), [20])
        for cuts in ((1, 19), (2, 18), (3, 1, 16), (7, 13)):
            history, parts = torch.zeros(1, 6, 3), []
            for own in x.split(list(cuts)):
                part, history = causal_conv1d(own, weight, history, [own.shape[0]])
                parts.append(part)
            torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=1e-6)
            self.assertTrue(torch.equal(history, last), f"cuts {cuts}")

    def test_update_steps_equal_prefill_and_touch_their_slots_only(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(9, 2, 6, generator=generator)  # nine steps of two sequences
        weight = torch.randn(6, 4, generator=generator)
        state = torch.randn(5, 6, 3, generator=generator)
        before, slots = state.clone(), torch.tensor([4, 1])
        outs = torch.stack([causal_conv1d_update(step, weight, state, slots) for step in x])
        packed = x.transpose(0, 1).reshape(18, 6)
        expected, final = causal_conv1d(packed, weight, before[slots], [9, 9])
        torch.testing.assert_close(outs.transpose(0, 1).reshape(18, 6), expected, atol=1e-6, rtol=1e-6)
        self.assertTrue(torch.equal(state[slots], final))
        self.assertTrue(torch.equal(state[[0, 2, 3]], before[[0, 2, 3]]))

    def test_history_is_kept_in_the_pools_dtype(self):
        x = torch.randn(5, 6)
        _, final = causal_conv1d(x, torch.randn(6, 4), torch.zeros(1, 6, 3, dtype=torch.bfloat16), [5])
        self.assertTrue(torch.equal(final[0], x[2:].t().bfloat16()))

    def test_no_tokens(self):
        out, final = causal_conv1d(torch.empty(0, 6), torch.randn(6, 4), torch.empty(0, 6, 3), [])
        self.assertEqual((tuple(out.shape), tuple(final.shape)), ((0, 6), (0, 6, 3)))
        empty = torch.empty(0, dtype=torch.int64)
        out = causal_conv1d_update(torch.empty(0, 6), torch.randn(6, 4), torch.zeros(3, 6, 3), empty)
        self.assertEqual(tuple(out.shape), (0, 6))


class TestGatingAndNorm(CustomTestCase):
    def test_gates_follow_the_formula(self):
        a = torch.tensor([[-30.0, -1.0, 0.0, 5.0, 19.5, 60.0]])
        A_log, dt_bias = torch.linspace(-2, 3, 6), torch.linspace(-1, 1, 6)
        g, beta = gdn_gating(a, a, A_log, dt_bias)
        for j in range(6):
            softplus = math.log1p(math.exp(float(a[0, j] + dt_bias[j])))
            self.assertAlmostEqual(float(g[0, j]) / (-math.exp(float(A_log[j])) * softplus), 1.0, places=5)
            self.assertAlmostEqual(float(beta[0, j]), 1 / (1 + math.exp(-float(a[0, j]))), places=6)
        self.assertEqual(g.dtype, torch.float32)

    def test_gates_are_float32_whatever_comes_in(self):
        a = torch.full((1, 1), 3.0, dtype=torch.bfloat16)
        g, beta = gdn_gating(a, a, torch.full((1,), 2.7), torch.full((1,), 0.1))
        self.assertAlmostEqual(float(g), -math.exp(2.7) * math.log1p(math.exp(3.1)), places=3)
        self.assertEqual(beta.dtype, torch.float32)

    def test_l2_norm_sums_and_keeps_eps_inside_the_root(self):
        small = torch.full((4,), 5e-4)  # sum of squares 1e-6, as large as eps
        torch.testing.assert_close(l2_norm(small), torch.full((4,), 5e-4 / math.sqrt(2e-6)))
        self.assertAlmostEqual(float(l2_norm(torch.randn(3, 64)).square().sum()), 3.0, places=4)
        self.assertTrue(torch.equal(l2_norm(torch.zeros(2, 4)), torch.zeros(2, 4)))


class TestDeltaRule(CustomTestCase):
    def check_chunked(self, lengths, shape, inputs, states, atol=2e-5):
        scale = shape[2] ** -0.5
        out, final = chunk_gated_delta_rule(*inputs, torch.stack(states), list(lengths), scale)
        self.assertTrue(bool(out.isfinite().all()) and bool(final.isfinite().all()))
        for i, length in enumerate(lengths):
            own = slice(sum(lengths[:i]), sum(lengths[: i + 1]))
            expected, state = true_recurrence(*(x[own] for x in inputs), states[i], scale)
            with self.subTest(length=length, shape=shape):
                torch.testing.assert_close(out[own].double(), expected, atol=atol, rtol=1e-4)
                torch.testing.assert_close(final[i].double(), state, atol=atol, rtol=1e-4)

    def test_chunked_matches_token_by_token_at_every_length_and_shape(self):
        for shape in SHAPES:
            inputs, _ = random_inputs(sum(LENGTHS), shape, seed=4)
            states = [random_inputs(0, shape, seed=5 + i)[1] for i in range(len(LENGTHS))]
            self.check_chunked(LENGTHS, shape, inputs, states)

    def test_strong_and_mixed_decay_neither_overflow_nor_blur(self):
        shape, lengths = SHAPES[1], (CHUNK_SIZE, 65, 5)
        inputs, state = random_inputs(sum(lengths), shape, seed=20)
        # Hundreds of nats on every third token and almost none on the others: sums reach 1e4 inside a chunk.
        inputs[3] = torch.where(torch.arange(sum(lengths))[:, None] % 3 == 0, -700.0, -1e-3).expand(-1, 4).clone()
        self.check_chunked(lengths, shape, inputs, [state] * 3)
        inputs[3].fill_(-1e4)
        self.check_chunked(lengths, shape, inputs, [state] * 3)

    def test_no_decay_and_full_writes(self):
        shape, lengths = SHAPES[0], (130,)
        inputs, state = random_inputs(130, shape, seed=21)
        inputs[3].zero_()
        inputs[4].fill_(1.0)
        self.check_chunked(lengths, shape, inputs, [state], atol=1e-4)

    def test_a_broken_neighbour_stays_alone(self):
        shape, lengths = SHAPES[1], (5, 70, 3)
        inputs, state = random_inputs(sum(lengths), shape, seed=22)
        clean, _ = chunk_gated_delta_rule(*inputs, torch.stack([state] * 3), list(lengths), 0.25)
        inputs[2][5:75] = float("nan")
        broken, final = chunk_gated_delta_rule(*inputs, torch.stack([state] * 3), list(lengths), 0.25)
        self.assertTrue(torch.equal(broken[:5], clean[:5]) and torch.equal(broken[75:], clean[75:]))
        self.assertTrue(bool(final[[0, 2]].isfinite().all()))

    def test_continuation_equals_one_pass(self):
        shape = SHAPES[1]
        inputs, state = random_inputs(130, shape, seed=23)
        whole, last = chunk_gated_delta_rule(*inputs, state[None], [130], 0.25)
        for cuts in ((64, 66), (1, 129), (7,) * 18 + (4,)):
            current, parts, start = state[None], [], 0
            for length in cuts:
                own = [x[start : start + length] for x in inputs]
                part, current = chunk_gated_delta_rule(*own, current, [length], 0.25)
                parts.append(part)
                start += length
            torch.testing.assert_close(torch.cat(parts), whole, atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(current, last, atol=2e-5, rtol=1e-4)

    def test_recurrent_steps_match_token_by_token_on_their_own_slots(self):
        for shape in SHAPES:
            k_dim = shape[2]
            pool = torch.stack([random_inputs(0, shape, seed=30 + i)[1] for i in range(6)])
            before, slots = pool.clone(), torch.tensor([5, 2, 3])
            sequences = [random_inputs(11, shape, seed=40 + i, strongest=30.0)[0] for i in range(3)]
            steps = [
                recurrent_gated_delta_rule(
                    *(torch.stack([own[j][t] for own in sequences]) for j in range(5)), pool, slots, k_dim**-0.5
                )
                for t in range(11)
            ]
            for i, own in enumerate(sequences):
                expected, state = true_recurrence(*own, before[slots[i]], k_dim**-0.5)
                torch.testing.assert_close(torch.stack(steps)[:, i].double(), expected, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(pool[slots[i]].double(), state, atol=1e-5, rtol=1e-4)
            self.assertTrue(torch.equal(pool[[0, 1, 4]], before[[0, 1, 4]]))

    def test_recurrent_state_in_bfloat16_is_rounded_once_a_step(self):
        shape = SHAPES[1]
        inputs, state = random_inputs(1, shape, seed=50)
        pool = state.bfloat16()[None].clone()
        recurrent_gated_delta_rule(*inputs, pool, torch.tensor([0]), 0.25)
        _, expected = true_recurrence(*inputs, state.bfloat16(), 0.25)
        self.assertTrue(torch.equal(pool[0], expected.bfloat16()))

    def test_no_tokens(self):
        (q, k, v, g, beta), state = random_inputs(0, SHAPES[2], seed=60)
        out, final = chunk_gated_delta_rule(q, k, v, g, beta, state[None][:0], [], 1.0)
        self.assertEqual((tuple(out.shape), tuple(final.shape)), ((0, 3, 16), (0, 3, 16, 24)))
        out, final = chunk_gated_delta_rule(q, k, v, g, beta, state[None], [0], 1.0)
        self.assertTrue(torch.equal(final[0], state))
        slots = torch.empty(0, dtype=torch.int64)
        self.assertEqual(recurrent_gated_delta_rule(q, k, v, g, beta, state[None].clone(), slots, 1.0).shape[0], 0)


class TestSteps(CustomTestCase):
    """The two whole-mixer ops against the formulas, on states that do not start at zero."""

    def check(self, args, after, out, slots, spans):
        for slot, rows in zip(slots, spans, strict=True):
            expected, columns, state = true_mixer(args, slot, rows)
            torch.testing.assert_close(out[rows].double(), expected, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(after[8][slot].double(), columns, atol=0, rtol=0)
            torch.testing.assert_close(after[9][slot].double(), state, atol=1e-5, rtol=1e-4)
        others = [slot for slot in range(args[8].shape[0]) if slot not in slots]
        for pool in (8, 9):
            self.assertTrue(torch.equal(after[pool][others], args[pool][others]))

    def test_decode_step(self):
        for seed, shape in enumerate(SHAPES):
            args = step_inputs(3, 6, (*shape, 4), torch.Generator().manual_seed(seed))
            after, slots = [x.clone() for x in args], [5, 2, 3]
            out = gdn_decode_step(*after, torch.tensor(slots), 1e-6)
            self.check(args, after, out, slots, [slice(i, i + 1) for i in range(3)])

    def test_extend_step(self):
        for seed, shape in enumerate(SHAPES):
            lengths = [5, 130, 0, 2]
            args = step_inputs(sum(lengths), 7, (*shape, 4), torch.Generator().manual_seed(seed))
            after, slots = [x.clone() for x in args], [5, 2, 3, 1]
            out = gdn_extend_step(*after, torch.tensor(slots), *chunk_table(lengths), 1e-6)
            ends = torch.tensor(lengths).cumsum(0).tolist()
            self.check(args, after, out, slots, [slice(e - n, e) for e, n in zip(ends, lengths, strict=True)])

    def test_chunk_table_names_every_chunk_of_every_sequence(self):
        bounds, chunks = chunk_table([1, 0, CHUNK_SIZE, CHUNK_SIZE + 1])
        self.assertEqual(bounds.tolist(), [0, 1, 1, 1 + CHUNK_SIZE, 2 + 2 * CHUNK_SIZE])
        self.assertEqual(chunks.tolist(), [[0, 0], [2, 0], [3, 0], [3, 1]])


class TestVerifyStep(CustomTestCase):
    """Steps of several tokens, of which some are rejected, against the accepted tokens one by one."""

    def check(self, rows, num_sequences, num_steps, seed):
        generator = torch.Generator().manual_seed(seed)
        shape = (2, 2, 16, 16, 4)
        slots = torch.randperm(num_sequences + 2, generator=generator)[:num_sequences] + 1
        *_, conv_weight, A_log, dt_bias, norm, conv, ssm = step_inputs(1, num_sequences + 3, shape, generator)
        parameters = (conv_weight, A_log, dt_bias, norm)
        plain_conv, plain_ssm = conv.clone(), ssm.clone()
        # What an earlier owner of a slot left there must not count.
        tail_qkv = torch.full((num_sequences + 3, rows, conv.shape[1]), torch.nan)
        tail_gates = torch.full((num_sequences + 3, rows, 2 * ssm.shape[1]), torch.nan)
        tail_len = torch.zeros(num_sequences + 3, dtype=torch.int64)
        for number in range(num_steps):
            if number == 2:  # another sequence gets the first slot
                for state in (conv, ssm, plain_conv, plain_ssm, tail_len):
                    state[slots[0]] = 0
                tail_qkv[slots[0]] = tail_gates[slots[0]] = torch.nan
            inputs = step_inputs(num_sequences * rows, 1, shape, generator)[:4]
            states = (conv, ssm, tail_qkv, tail_gates, tail_len)
            found = gdn_verify_step(*inputs, *parameters, *states, slots, 1e-6).unflatten(0, (num_sequences, rows))
            counts = torch.randint(1, rows + 1, (num_sequences,), generator=generator)
            for i in range(num_sequences):
                for j in range(int(counts[i])):
                    one = [part[i * rows + j : i * rows + j + 1] for part in inputs]
                    wanted = gdn_decode_step(*one, *parameters, plain_conv, plain_ssm, slots[i : i + 1], 1e-6)
                    torch.testing.assert_close(found[i, j], wanted[0], atol=1e-6, rtol=1e-6)
            tail_len[slots] = counts
        return conv, ssm, plain_conv, plain_ssm, slots

    def test_tokens_that_count_come_out_as_one_by_one(self):
        for rows, num_sequences in ((2, 1), (3, 4), (5, 2)):
            with self.subTest(rows=rows, num_sequences=num_sequences):
                self.check(rows, num_sequences, num_steps=6, seed=rows)

    def test_a_row_changes_no_earlier_one_whatever_it_holds(self):
        shape, rows = (2, 2, 16, 16, 4), 4
        *inputs, conv, ssm = step_inputs(2 * rows, 3, shape, torch.Generator().manual_seed(4))
        gates = torch.cat(inputs[2:4], dim=-1)
        tails = [part.unflatten(0, (2, rows))[[0, 0, 1]] for part in (inputs[0], gates)]
        tail_len, slots = torch.tensor([0, 2, 3]), torch.tensor([1, 2])

        def answers(ugly=None, at=None):
            given = [part.clone() for part in inputs]
            if ugly is not None:
                for part in (given[0], *given[2:4]):
                    part.unflatten(0, (2, rows))[0, at] = ugly
            states = [part.clone() for part in (conv, ssm, *tails)]
            return gdn_verify_step(*given, *states, tail_len, slots, 1e-6).unflatten(0, (2, rows))

        sound = answers()
        for ugly in (torch.nan, torch.inf):
            for at in range(rows):
                found = answers(ugly, at)
                torch.testing.assert_close(found[0, :at], sound[0, :at], atol=1e-6, rtol=1e-6)
                torch.testing.assert_close(found[1], sound[1], atol=1e-6, rtol=1e-6)
                self.assertFalse(bool(found[0, at].isfinite().all()))

    def test_slots_of_others_stay_as_they_are(self):
        conv, ssm, plain_conv, plain_ssm, slots = self.check(3, 2, num_steps=2, seed=9)
        others = [slot for slot in range(1, len(conv)) if slot not in slots.tolist()]
        self.assertTrue(torch.equal(conv[others], plain_conv[others]) and torch.equal(ssm[others], plain_ssm[others]))


class TestCases(CustomTestCase):
    def test_every_case_runs_and_gives_finite_numbers_of_finite_gates(self):
        for op in (gdn_decode_step, gdn_extend_step, gdn_verify_step):
            cases = list(cases_of(op))
            self.assertGreaterEqual(len(cases), 3, op.name)
            for case in cases:
                result = op(*case.args)
                for tensor in result if isinstance(result, tuple) else (result,):
                    finite = bool(tensor.isfinite().all())
                    self.assertEqual(finite, not case.name.endswith("nan-gate"), f"{op.name} {case.name}")


if __name__ == "__main__":
    unittest.main()

"""Every op, every implementation that runs here, every case: against the reference, and the reference against loops."""

import math
import unittest
from pathlib import Path
from unittest.mock import patch

import torch

from sglang.kernels.ops.moe import fused_experts
from sglang.kernels.registry import REGISTRY
from sglang.kernels.spec import Impl
from sglang.test.attention_truth import ATTENTION_TRUTHS
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.draw_truth import judge_draw
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.mxfp4_checkpoints import true_weights
from sglang.test.op_cases import cases_of
from sglang.test.router_truth import check_router, scores_of
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

# Groups whose references are compared with their own truth in another file of test/registered.
TRUTH_ELSEWHERE = {
    "attention_state": "kernels/test_triton_attention.py",
    "compressed": "kernels/test_compressed_ops.py",
    "gdn": "kernels/test_gdn_ops.py",
    "mhc": "kernels/test_mhc_ops.py",
    "kv_cache": "kernels/test_triton_attention.py",
    "prepare": "kernels/test_prepare_ops.py",
    "sampling": "sampling/test_sampler.py",
}


def strided_copy(tensor, device=None):
    """A copy with the same strides, gaps included."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device or tensor.device)
    return copy.copy_(tensor)


def clone(args):
    return tuple(strided_copy(arg) if isinstance(arg, torch.Tensor) else arg for arg in args)


def tensors(value):
    return (value,) if isinstance(value, torch.Tensor) else tuple(part for part in value if not isinstance(part, bool))


def flags(value):
    """What an op reports of its result in addition to the tensors."""
    return [] if isinstance(value, torch.Tensor) else [part for part in value if isinstance(part, bool)]


# --- truths: float64, one row and one head at a time -------------------------------------------------------------


def true_rms_norm(x, weight, eps, unit=0.0):
    rows = x.double().reshape(-1, x.shape[-1])
    out = [row / math.sqrt(float(row @ row) / len(row) + eps) * (weight.double() + unit) for row in rows]
    return torch.stack(out).view(x.shape) if out else x.double()


def true_gemma(x, weight, eps):
    return true_rms_norm(x, weight, eps, unit=1.0)


def true_gated_norm(x, gate, weight, eps):
    return true_rms_norm(x, weight, eps) * gate.double() / (1 + torch.exp(-gate.double()))


def true_fused_add(x, residual, weight, eps, unit=0.0):
    total = x.double() + residual.double()
    return true_rms_norm(total, weight, eps, unit), total


def true_silu_and_mul(x, limit=None):
    half = x.shape[-1] // 2
    gate, up = x[..., :half].double(), x[..., half:].double()
    if limit is not None:
        gate, up = gate.minimum(torch.tensor(limit)), up.minimum(torch.tensor(limit)).maximum(torch.tensor(-limit))
    return gate / (1 + torch.exp(-gate)) * up


def true_rotary(positions, q, k, cache, is_neox):
    half = cache.shape[1] // 2

    def rotate(x):
        out = x.double().clone()
        for row, position in enumerate(positions.tolist()):
            for i in range(half):
                a, b = (i, i + half) if is_neox else (2 * i, 2 * i + 1)
                turn = complex(float(cache[position, i]), float(cache[position, half + i]))
                for head in range(x.shape[1]):
                    turned = complex(float(x[row, head, a]), float(x[row, head, b])) * turn
                    out[row, head, a], out[row, head, b] = turned.real, turned.imag
        return out

    return rotate(q), rotate(k)


def true_rotary_tail(x, positions, cache, inverse=False):
    first, half = x.shape[-1] - cache.shape[1], cache.shape[1] // 2
    table = torch.hstack((cache[:, :half], -cache[:, half:])) if inverse else cache
    turned = true_rotary(positions, x[..., first:], x[:, :0, first:], table, False)[0]
    return torch.cat((x[..., :first].double(), turned), dim=-1)


def true_experts(x, w13, w2, weights, ids, limit=None):
    out = torch.zeros(x.shape, dtype=torch.float64)
    for row in range(x.shape[0]):
        for weight, expert in zip(weights[row].tolist(), ids[row].tolist()):
            if expert >= 0:
                hidden = w13[expert].double() @ x[row].double()
                out[row] += weight * (w2[expert].double() @ true_silu_and_mul(hidden, limit))
    return out


EVERY_FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
EVERY_FP8 = EVERY_FP8[EVERY_FP8.isfinite()]


def true_quantize(x, dtype):
    q, scales = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape[0], x.shape[1] // 128).double()
    for row in range(x.shape[0]):
        for group in range(x.shape[1] // 128):
            cols = slice(128 * group, 128 * group + 128)
            scales[row, group] = scale = max(float(x[row, cols].abs().max()), 1e-10) / 448
            wanted = x[row, cols].double() / scale
            near = EVERY_FP8[(EVERY_FP8.unsqueeze(1) - wanted).abs().argmin(0)]
            q[row, cols] = torch.where(wanted.isnan(), wanted, near)
    return q, scales


def true_block_linear(x, w, w_scale, x_scale=None, dtype=None):
    q, scales = true_quantize(x, w.dtype) if x_scale is None else (x.double(), x_scale.double())
    out = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    for col in range(w.shape[0]):
        for group in range(x.shape[1] // 128):
            cols = slice(128 * group, 128 * group + 128)
            out[:, col] += q[:, cols] @ w[col, cols].double() * scales[:, group] * float(w_scale[col // 128, group])
    return out


def true_experts_fp8(x, w13, w13_scale, w2, w2_scale, weights, ids, x_scale=None, dtype=None, limit=None):
    x = x if x_scale is None else x.float() * x_scale.repeat_interleave(128, 1)
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in set(ids.flatten().tolist()) - {-1}:
        tokens = [row for row in range(x.shape[0]) if expert in ids[row].tolist()]
        gate_up = true_block_linear(x[tokens], w13[expert], w13_scale[expert])
        rows = true_block_linear(true_silu_and_mul(gate_up, limit).float(), w2[expert], w2_scale[expert])
        for row, token in zip(rows, tokens):
            out[token] += row * sum(w for w, i in zip(weights[token].tolist(), ids[token].tolist()) if i == expert)
    return out


def true_norm_quantized(x, residual, weight, eps, dtype):
    total = x.double() if residual is None else x.double() + residual.double()
    normed = true_rms_norm(total, weight, eps)
    return normed, *true_quantize(normed, dtype), total


def true_add_norm_logits(x, residual, weight, eps, gate, logits_dtype, unit_offset=False, dtype=None):
    total = x.double() + residual.double()
    normed = true_rms_norm(total, weight, eps, unit=float(unit_offset))
    made = () if dtype is None else true_quantize(normed, dtype)
    return normed, total, true_router_logits(normed, gate), *made


def true_norm_product(x, residual, weight, eps, w, unit_offset=False):
    total = x.double() if residual is None else x.double() + residual.double()
    normed = true_rms_norm(total, weight, eps, unit=float(unit_offset))
    return true_linear(normed, w), normed, total


def true_silu_and_mul_quantized(x, dtype, limit=None):
    return true_quantize(true_silu_and_mul(x, limit), dtype)


def true_decode_project(*args):
    rows = ATTENTION_TRUTHS["attention.mla_decode_project"](*args[:7])
    return true_quantize(rows, args[7]) if len(args) == 8 else rows


def true_sigmoid_mul(x, gate):
    return x.double() / (1 + torch.exp(-gate.double()))


def true_add_gated_shared(routed, shared, x, weight):
    rows = [
        routed[i].double() + shared[i].double() / (1 + math.exp(-float(x[i].double() @ weight[0].double())))
        for i in range(x.shape[0])
    ]
    return torch.stack(rows) if rows else routed.double()


def true_router_logits(x, weight):
    rows = [weight.double() @ row for row in x.double()]
    return torch.stack(rows) if rows else torch.empty(0, weight.shape[0], dtype=torch.float64)


def true_route_by_id(logits, token_ids, table, rule):
    ids = [table[token].tolist() for token in token_ids.tolist()]
    scores = [scores_of(row, rule.scoring) for row in logits.double().tolist()]
    weights = [[row[i] for i in chosen] for row, chosen in zip(scores, ids)]
    weights = [[w * rule.scale / (sum(row) if rule.renormalize else 1.0) for w in row] for row in weights]
    shape = (len(ids), table.shape[1])
    return torch.tensor(weights).double().view(shape), torch.tensor(ids).double().view(shape)


def true_check_ids(chosen, faults, vocab_size):
    ids = [min(max(one, 0), vocab_size - 1) for one in chosen.tolist()]
    faulty = [fault or 3 * (one not in range(vocab_size)) for one, fault in zip(chosen.tolist(), faults.tolist())]
    return torch.tensor(ids).double(), torch.tensor(faulty).double()


def true_linear(x, w, bias=None):
    rows = [w.double() @ row for row in x.double()]
    out = torch.stack(rows) if rows else torch.empty(0, w.shape[0], dtype=torch.float64)
    return out if bias is None else out + bias.double()


TRUTHS = {
    "sampling.check_ids": true_check_ids,
    "linear.dense": true_linear,
    "norm.rms_norm": true_rms_norm,
    "norm.gated_rms_norm": true_gated_norm,
    "norm.fused_add_rms_norm": true_fused_add,
    "norm.rms_norm_quantized": true_norm_quantized,
    "norm.add_norm_logits": true_add_norm_logits,
    "norm.norm_product": true_norm_product,
    "activation.silu_and_mul": true_silu_and_mul,
    "activation.silu_and_mul_quantized": true_silu_and_mul_quantized,
    "activation.sigmoid_mul": true_sigmoid_mul,
    "rope.rotary": true_rotary,
    "rope.rotary_tail": true_rotary_tail,
    "moe.fused_experts": true_experts,
    "moe.route_by_id": true_route_by_id,
    "moe.router_logits": true_router_logits,
    "moe.add_gated_shared": true_add_gated_shared,
    "moe.fused_experts_fp8": true_experts_fp8,
    "moe.fused_experts_mxfp4": lambda x, w13, w13_scale, w2, w2_scale, *rest: true_experts(
        x, true_weights(w13, w13_scale), true_weights(w2, w2_scale), *rest
    ),
    "quant.quantize_groups": true_quantize,
    "quant.block_fp8_linear": true_block_linear,
    **ATTENTION_TRUTHS,
    "attention.mla_decode_project": true_decode_project,
}

# Ops that round to 8 bits what they compute: its last bit decides which of two neighbours is the nearest.
QUANTIZING = (
    "norm.rms_norm_quantized", "norm.add_norm_logits", "activation.silu_and_mul_quantized",
    "attention.mla_decode_project",
)  # fmt: skip

# Ops whose arguments or results have a dtype of their own next to bfloat16.
OWN_DTYPES = (
    "moe.fused_experts_fp8", "moe.fused_experts_mxfp4", "moe.route_by_id", "moe.router_logits",
    "quant.quantize_groups", "quant.block_fp8_linear", "sampling.check_ids", *QUANTIZING,
)  # fmt: skip


def assert_neighbours(found, wanted):
    """8-bit floats [...]: at most one in 200 differs, and only by one step of the format."""
    bits = [tensor.to(torch.float8_e4m3fn).view(torch.uint8).cpu().int() for tensor in (found, wanted)]
    ranks = [torch.where(part < 128, part, 128 - part) for part in bits]
    far = (ranks[0] - ranks[1]).abs()
    assert found.shape == wanted.shape and (far <= 1).all() and far.sum() <= far.numel() / 200


def widened(tensor):
    """8-bit floats as float32, which assert_close can compare; others as they are."""
    return tensor.float() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


# Matrix units sum 8-bit products with some 14 bits (DeepSeek-V3 report, section 3.3.2), and experts round once more in
# between: the largest error of a row, relative to the row's length.
EIGHT_BIT_ERROR = {"quant.block_fp8_linear": 3e-3, "moe.fused_experts_fp8": 3e-2}


def assert_near_by_row(found, wanted, bound):
    """Rows of ``found`` differ from those of ``wanted`` by at most ``bound`` of the latter's length."""
    found, wanted = found.double().cpu(), wanted.double().cpu()
    assert found.shape == wanted.shape and torch.equal(found.isnan(), wanted.isnan())
    error = (found - wanted).nan_to_num().norm(dim=-1)
    worst = (error / wanted.nan_to_num().norm(dim=-1).clamp(min=1e-30)).max().item() if error.numel() else 0.0
    assert worst <= bound, f"a row is off by {worst:.2g} of its length, more than {bound:.2g}"


def check_case(op, impl, case, on_matrix_units=False):
    """Run one implementation on one case; AssertionError if it differs from the reference or the truth."""
    args = clone(case.args)
    if on_matrix_units and op.name in EIGHT_BIT_ERROR:
        wanted = op.reference(*clone(case.args))
        assert_near_by_row(impl.fn(*args), wanted, EIGHT_BIT_ERROR[op.name])
        return
    out = impl.fn(*args)
    if op.name == "moe.topk":
        check_router(case.args, out)
        return
    if op.name == "sampling.draw":
        judge_draw(case.args, *out, op.reference(*case.args)[1])
        return
    expected_args = clone(case.args)
    expected = op.reference(*expected_args)
    assert flags(out) == flags(expected), (flags(out), flags(expected))
    for found, wanted in zip(tensors(out), tensors(expected), strict=True):
        assert found.dtype == wanted.dtype
        if op.name in QUANTIZING and found.itemsize == 1:
            assert_neighbours(found, wanted)
            continue
        torch.testing.assert_close(widened(found), widened(wanted), rtol=1e-4, atol=1e-5, equal_nan=True)
    # What an op does to its arguments is part of its contract: usually nothing, for state updates the same thing.
    for found, wanted in zip(args, expected_args, strict=True):
        if isinstance(found, torch.Tensor):
            torch.testing.assert_close(widened(found), widened(wanted), rtol=1e-4, atol=1e-5, equal_nan=True)
    truth = TRUTHS.get(op.name)
    if truth is not None:
        for found, wanted in zip(tensors(out), tensors(truth(*case.args)), strict=True):
            if op.name in QUANTIZING and found.itemsize == 1:
                assert_neighbours(found, wanted)
                continue
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=2e-5, equal_nan=True)
        for found, before in zip(args, case.args, strict=True):
            if isinstance(found, torch.Tensor):
                torch.testing.assert_close(widened(found), widened(before), rtol=0, atol=0, equal_nan=True)


class TestOpParity(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        with fresh_decisions():
            REGISTRY.freeze()
            cls.runnable = {
                op.name: [impl for impl in op.impls if REGISTRY.records[op.name].verdicts[impl.name] == "ok"]
                for op in REGISTRY.ops.values()
            }

    def test_every_implementation_on_every_case(self):
        count = 0
        for name, impls in sorted(self.runnable.items()):
            op = REGISTRY.ops[name]
            cases = list(cases_of(op))
            self.assertGreater(len(cases), 0, f"op {name} has no cases")
            for impl in impls:
                for case in cases:
                    if impl.accepts is None or impl.accepts(*case.args):
                        with self.subTest(op=name, impl=impl.name, case=case.name):
                            check_case(op, impl, case)
                            count += 1
        print(f"{count} (op, implementation, case) triples")

    def test_every_op_has_a_truth(self):
        registered = Path(__file__).resolve().parents[1]
        for name, op in REGISTRY.ops.items():
            if name in TRUTHS or name == "moe.topk":
                continue
            elsewhere = TRUTH_ELSEWHERE.get(op.group)
            self.assertIsNotNone(elsewhere, f"op {name} is held against nothing independent")
            text = (registered / elsewhere).read_text(encoding="utf-8")
            self.assertIn(op.reference.__module__, text, f"{elsewhere} does not test {name}")

    def test_aiter_takes_no_limit(self):
        """Its experts do not clamp: it runs calls without a limit, and none with a limit."""
        for name in ("moe.fused_experts", "moe.fused_experts_fp8"):
            op = REGISTRY.ops[name]
            aiter = next(impl for impl in op.impls if impl.name == "aiter")
            clamped = [case for case in cases_of(op) if "clamped" in case.name]
            self.assertGreater(len(clamped), 2)
            for case in clamped:
                args = [case.args[0].bfloat16(), *case.args[1:]]
                if name == "moe.fused_experts":
                    args[1:3] = [stack.bfloat16() for stack in args[1:3]]
                for arg in args:
                    if isinstance(arg, torch.Tensor):
                        arg.is_shuffled = True
                with self.subTest(op=name, case=case.name):
                    self.assertEqual([aiter.accepts(*args[:-1], limit) for limit in (None, args[-1])], [True, False])

    def test_experts_are_the_same_one_by_one_and_all_at_once(self):
        op = REGISTRY.ops["moe.fused_experts"]
        for limit in (-1, 1 << 40):
            with patch.object(fused_experts, "DENSE_PRODUCTS", limit):
                for case in cases_of(op):
                    with self.subTest(limit=limit, case=case.name):
                        found, wanted = op.reference(*clone(case.args)), TRUTHS[op.name](*case.args)
                        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)

    def test_bfloat16_stays_near_the_truth(self):
        for name, truth in TRUTHS.items():
            if name in OWN_DTYPES:
                continue
            for case in cases_of(REGISTRY.ops[name]):
                if case.name in ("saturated", "huge", "nan-row", "cancelling"):
                    continue
                args = [
                    arg.bfloat16() if isinstance(arg, torch.Tensor) and arg.is_floating_point() else arg
                    for arg in case.args
                ]
                if name.startswith("rope."):
                    table = {"rope.rotary": 3, "rope.rotary_tail": 2}[name]
                    args[table] = case.args[table]
                with self.subTest(op=name, case=case.name):
                    out = tensors(REGISTRY.ops[name].reference(*clone(args)))
                    for found, wanted in zip(out, tensors(truth(*args)), strict=True):
                        self.assertEqual(found.dtype, torch.bfloat16)
                        torch.testing.assert_close(found.double(), wanted, rtol=3e-2, atol=3e-2, equal_nan=True)


def _break(fn, how):
    def broken(*args, **kwargs):
        return how(fn(*args, **kwargs), args)

    return broken


class TestTheTest(CustomTestCase):
    """The tests above must fail for implementations with typical errors of kernels."""

    def assert_noticed(self, name, how):
        op = REGISTRY.ops[name]
        broken = Impl("broken", _break(op.reference, how))
        with self.assertRaises(AssertionError):
            for case in cases_of(op):
                check_case(op, broken, case)

    def test_wrong_answers_are_noticed(self):
        REGISTRY.load_all()

        def in_place(out, args):
            args[0].mul_(2)
            return out

        def one_row_off(out, args):
            return torch.cat((out[:-1], out[-1:] * 1.01)) if out.shape[0] else out

        def repeated_expert(out, args):
            weights, ids = out
            return weights, ids[:, :1].expand(ids.shape).contiguous()

        def biased_weights(out, args):
            weights, ids = out
            logits, bias, rule = args[:3]
            if bias is None or ids.shape[1] > 4:
                return out
            chosen = logits.sigmoid().add(bias).gather(1, ids.long())
            return (chosen / chosen.sum(-1, keepdim=True) * rule.scale).float(), ids

        self.assert_noticed("moe.fused_experts", in_place)
        self.assert_noticed("moe.fused_experts", one_row_off)
        self.assert_noticed("attention.decode_padded", one_row_off)
        self.assert_noticed("attention.extend_ragged", lambda out, args: out.nan_to_num().roll(1, 0))
        self.assert_noticed("rope.rotary", lambda out, args: (out[0], args[2]))
        self.assert_noticed("moe.topk", lambda out, args: (out[0] * 2, out[1]))
        self.assert_noticed("moe.topk", repeated_expert)
        self.assert_noticed("moe.topk", biased_weights)


if __name__ == "__main__":
    unittest.main()

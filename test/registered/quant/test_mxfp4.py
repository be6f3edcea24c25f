"""MXFP4: the packer against brute force, every code at the ends of the scales, and the experts' product over them."""

import itertools
import json
import unittest
from types import SimpleNamespace
from unittest import mock

import torch

from sglang.kernels.ops.moe import fused_experts_mxfp4 as experts_module
from sglang.kernels.ops.moe.fused_experts_mxfp4 import (
    PROOF_TOKENS,
    fused_experts_mxfp4_scaled,
    fused_experts_mxfp4_torch,
    random_experts,
    require_true_scaled_product,
)
from sglang.kernels.ops.moe.fused_experts_mxfp4_triton import SM90_EIGHTHS
from sglang.kernels.ops.moe.tiles import TABLE, choose_tiles
from sglang.kernels.ops.quant.mxfp4 import (
    LARGEST_FLOAT32,
    dequantize_mxfp4,
    quantize_mxfp4,
    round_e2m1,
    scales_of,
    unpack_eighths,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")


# As the standard lists them: sign, two bits of exponent with bias 1, one of fraction.
def _number(code):
    exponent, fraction = (code >> 1) & 3, code & 1
    size = 0.5 * fraction if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2)
    return -size if code & 8 else size


EVERY_CODE = [_number(code) for code in range(16)]
SCALE_BYTES = (0, 1, 127, 254)


def true_matrix(codes, scale):
    """What packed rows stand for, one number at a time in float64 (exact: 2^127 * 6 has room)."""
    rows = []
    for row, powers in zip(codes.tolist(), scale.tolist()):
        numbers = [EVERY_CODE[part] for byte in row for part in (byte % 16, byte // 16)]
        rows.append([value * 2.0 ** (powers[i // 32] - 127) for i, value in enumerate(numbers)])
    return torch.tensor(rows, dtype=torch.float64)


def run_ptx(text, operands):
    """The straight-line PTX on int64 tensors of 32 bits, operands by number changed in place: what sm_90 would do."""
    registers = {f"${i}": operand for i, operand in enumerate(operands)}

    def value(word):
        return registers[word] if word in registers else torch.tensor(int(word, 0))

    def halves(word):
        bits = value(word)
        parts = [((bits >> shift) & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.bfloat16) for shift in (0, 16)]
        return [part.float() for part in parts]

    for line in text.strip().strip("{}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        op, rest = line.strip().split(maxsplit=1)
        target, *given = [word.strip() for word in rest.split(",")]
        if op == "prmt.b32":
            both = value(given[0]) | value(given[1]) << 32
            chosen = [(int(given[2], 0) >> (4 * i)) & 15 for i in range(4)]
            assert max(chosen) < 8
            registers[target] = sum(((both >> (8 * byte)) & 0xFF) << (8 * i) for i, byte in enumerate(chosen))
        elif op == "mul.bf16x2":
            low, high = (a * b for a, b in zip(halves(given[0]), halves(given[1])))
            bits = [part.bfloat16().view(torch.int16).long() & 0xFFFF for part in (low, high)]
            registers[target] = bits[0] | bits[1] << 16
        else:
            simple = {
                "mov.b32": lambda a: a,
                "and.b32": lambda a, b: a & b,
                "mul.lo.u32": lambda a, b: a * b & 0xFFFFFFFF,
            }
            registers[target] = simple[op](*map(value, given))
    return registers


class TestCodesOnSm90(CustomTestCase):
    def test_every_byte_beside_every_scale(self):
        """Four bytes give their first numbers in two registers and their second in two, an eighth of each, exactly."""
        words = torch.randint(0, 256, (512, 4), generator=torch.Generator().manual_seed(6))
        words[:256] = torch.arange(256).unsqueeze(1)
        word = sum(words[:, i] << (8 * i) for i in range(4))
        for byte in range(255):
            power = torch.tensor(max(byte << 7, 1 << 6))
            scale = power | power << 16
            found = run_ptx(SM90_EIGHTHS.value, [None] * 4 + [word, scale, scale])
            scales = torch.full((512, 1), byte, dtype=torch.uint8)
            wanted = unpack_eighths(words.to(torch.uint8).repeat(1, 4), scales)[:, :8]
            for number in range(8):
                place, second = divmod(number, 2)
                bits = (found[f"${2 * second + place // 2}"] >> (16 * (place % 2))) & 0xFFFF
                numbers = bits.to(torch.int32).to(torch.int16).view(torch.bfloat16)
                self.assertTrue(torch.equal(numbers, wanted[:, number].bfloat16()), (byte, number))


class TestPacker(CustomTestCase):
    def test_nearest_number_and_ties_to_the_even_code(self):
        middles = [(a + b) / 2 for a, b in itertools.pairwise(EVERY_CODE[:8])]
        x = torch.cat((
            torch.randn(4000, generator=torch.Generator().manual_seed(0)) * 3,
            torch.tensor([sign * value * (1 + nudge) for value in middles + EVERY_CODE[:8] + [1e9]
                          for sign in (1, -1) for nudge in (0, 1e-6, -1e-6)]),
        ))  # fmt: skip
        found = round_e2m1(x).tolist()
        for value, code in zip(x.double().tolist(), found):
            far = [abs(abs(value) - other) for other in EVERY_CODE[:8]]
            near = [i for i, distance in enumerate(far) if distance == min(far)]
            self.assertIn(code & 7, near, value)
            if len(near) == 2:
                self.assertEqual(code % 2, 0, f"{value} lies between the codes {near}")
        self.assertEqual(
            round_e2m1(torch.tensor([0.25, 0.75, 2.5, 3.5, 5.0, -5.0, -0.0])).tolist(), [0, 2, 4, 6, 6, 14, 8]
        )

    def test_scales(self):
        largest = torch.tensor([6.0, 6.99, 7.0, 8.0, 1.0, 2.0**-126, 2.0**-140, 3e38, 0.0, float("inf"), float("nan")])
        w = torch.zeros(len(largest), 64)
        w[:, 40] = largest
        w[:, 0] = 1.0
        codes, scale = quantize_mxfp4(w)
        self.assertEqual((codes.dtype, codes.shape, scale.shape), (torch.uint8, (len(largest), 32), (len(largest), 2)))
        self.assertEqual(scale[:, 1].tolist(), [127, 127, 128, 128, 125, 0, 0, 253, 127, 255, 255])
        # A large number is not cut, and what lies below half of the least one becomes zero.
        numbers = dequantize_mxfp4(codes, scale)[:, 40]
        self.assertEqual(numbers[:5].tolist(), [6.0, 6.0, 8.0, 8.0, 1.0])
        self.assertEqual(numbers[[6, 8]].tolist(), [0.0, 0.0])
        self.assertTrue(bool(numbers[9:].isnan().all()))
        with self.assertRaisesRegex(ValueError, "48 entries"):
            quantize_mxfp4(torch.zeros(2, 48))

    def test_the_error_is_that_of_three_bits(self):
        w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
        back = dequantize_mxfp4(*quantize_mxfp4(w))
        groups, error = w.view(64, 8, 32), (back - w).view(64, 8, 32)
        # Half of the largest step, 2 between 4 and 6, is at most a quarter of the largest number (6.99 becomes 6).
        self.assertLess(float((error.abs().amax(-1) / groups.abs().amax(-1)).max()), 0.25)
        self.assertLess(float(error.square().mean().sqrt()), 0.13)
        again = quantize_mxfp4(back)
        self.assertTrue(torch.equal(dequantize_mxfp4(*again), back), "packing what was packed changes nothing")


class TestNumbers(CustomTestCase):
    def test_every_code_and_scale(self):
        low, high = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
        codes = (low + 16 * high).flatten().to(torch.uint8).view(16, 16)
        for byte in SCALE_BYTES:
            scale = torch.full((16, 1), byte, dtype=torch.uint8)
            wanted = true_matrix(codes, scale)
            eighths = unpack_eighths(codes, scale)
            self.assertTrue(torch.equal(eighths.double() * 8, wanted), byte)
            self.assertTrue(torch.equal(torch.signbit(eighths), torch.signbit(wanted)))
            fits = wanted.abs() <= torch.finfo(torch.float32).max
            found = dequantize_mxfp4(codes, scale)
            self.assertTrue(torch.equal(found.double()[fits], wanted[fits]))
            self.assertEqual(bool(fits.all()), byte <= LARGEST_FLOAT32)
            self.assertTrue(bool(found[~fits].isinf().all()))
        self.assertTrue(bool(scales_of(torch.tensor([255], dtype=torch.uint8)).isnan()))


class TestExperts(CustomTestCase):
    """The reference against float64 over the dequantised weights."""

    def check(self, w13, w13_scale, w2, w2_scale, x, limit=None):
        ids = torch.tensor([[0], [-1], [0]], dtype=torch.int32)
        weights = torch.tensor([[0.5], [2.0], [-1.5]])
        found = fused_experts_mxfp4_torch(x, w13, w13_scale, w2, w2_scale, weights, ids, limit)
        first, second = true_matrix(w13[0], w13_scale[0]), true_matrix(w2[0], w2_scale[0])
        gate, up = (x.double() @ first.t()).chunk(2, dim=-1)
        if limit is not None:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        wanted = (gate / (1 + torch.exp(-gate)) * up) @ second.t() * weights.double()
        wanted[1] = 0.0
        self.assertEqual(found.dtype, x.dtype)
        error = (found.double() - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)
        bound = 1e-6 if x.dtype == torch.float32 else 8e-3
        self.assertLess(float(error.max()), bound)
        return wanted

    def test_ordinary_weights(self):
        generator = torch.Generator().manual_seed(2)
        stacks = (*random_experts(2, 128, 96, generator), *random_experts(2, 96, 64, generator))
        x = torch.randn(3, 96, generator=generator)
        for limit, dtype in itertools.product((None, 0.5), (torch.float32, torch.bfloat16)):
            self.check(*stacks, x.to(dtype), limit)

    def test_every_code_at_the_ends_of_the_scales(self):
        """Rows are sized so that gates are ordinary numbers; what overflows float32 before its scale would be inf."""
        generator = torch.Generator().manual_seed(3)
        w13 = torch.randint(0, 256, (1, 64, 16), generator=generator).to(torch.uint8)
        w2 = torch.randint(0, 256, (1, 32, 16), generator=generator).to(torch.uint8)
        for codes in (w13, w2):
            self.assertEqual(len(torch.cat((codes % 16, codes // 16)).unique()), 16)
        for byte in SCALE_BYTES:
            w13_scale = torch.full((1, 64, 1), byte, dtype=torch.uint8)
            w2_scale = torch.full((1, 32, 1), 127, dtype=torch.uint8)
            x = torch.randn(3, 32, generator=generator).double() * 2.0 ** (min(127, 127 - byte) - 2)
            wanted = self.check(w13, w13_scale, w2, w2_scale, x.float())
            self.assertGreater(float(wanted[0].abs().max()), 1e-3)
            # And the other product, whose rows are then tiny or huge.
            self.check(w13, torch.full_like(w13_scale, 127), w2, torch.full_like(w2_scale, byte),
                       torch.randn(3, 32, generator=generator) * (2.0**-60 if byte == 254 else 1.0))  # fmt: skip


class TestProofOfTheScaledProduct(CustomTestCase):
    """The form that leaves the product of codes to the compiler runs only where that has been seen to be right."""

    def setUp(self):
        require_true_scaled_product.cache_clear()
        self.addCleanup(require_true_scaled_product.cache_clear)
        self.calls = []

    def prove(self, change):
        def product(x, w13, w13_scale, w2, w2_scale, *rest, scaled):
            self.calls.append(x.shape[0])
            self.assertTrue(scaled)
            return fused_experts_mxfp4_torch(x, *change(w13, w13_scale, w2, w2_scale), *rest)

        with mock.patch.object(experts_module, "run_mxfp4", product):
            require_true_scaled_product(torch.device("cpu"))

    def test_a_true_product_is_proven_once(self):
        for _ in range(3):
            self.prove(lambda *stacked: stacked)
        self.assertEqual(self.calls, list(PROOF_TOKENS))

    def test_a_wrong_one_is_refused(self):
        def permuted(codes):
            """Bits of the place of a code along 128 of a row in the order that Triton 3.6 leaves them in for sm_90."""
            rows, columns = codes.shape[:2], codes.shape[2] * 2
            halves = torch.stack((codes & 15, codes >> 4), -1).reshape(*rows, columns)
            wide = torch.nn.functional.pad(halves, (0, -columns % 128)).reshape(*rows, -1, 2, 2, 2, 2, 2, 2, 2)
            moved = wide.permute(0, 1, 2, 9, 3, 4, 6, 7, 8, 5).reshape(*rows, -1)[:, :, :columns]
            return moved[..., ::2] | (moved[..., 1::2] << 4)

        for name, change in (
            ("permuted", lambda a, b, c, d: (permuted(a), b, permuted(c), d)),
            ("halves of bytes", lambda a, b, c, d: ((a << 4) | (a >> 4), b, c, d)),
            ("scales of the neighbour", lambda a, b, c, d: (a, b, c, d.roll(1, 1))),
            ("not a number", lambda a, b, c, d: (a, b, c, torch.full_like(d, 255))),
        ):
            with self.subTest(change=name), self.assertRaisesRegex(RuntimeError, "dot_scaled is wrong on .*'triton'"):
                self.prove(change)

    def test_each_row_of_a_tile_table_is_proven(self):
        for arch, table in json.loads(TABLE.read_text(encoding="utf-8")).items():
            rows = table["4"]
            reached = {str(choose_tiles(arch, 4, tokens, 1, 2)) for tokens in PROOF_TOKENS}
            self.assertEqual(len(reached), 1 + len(rows["many"]), arch)

    def test_it_comes_before_the_product(self):
        x = SimpleNamespace(device=torch.device("cuda"))
        with mock.patch.object(experts_module, "require_true_scaled_product", side_effect=RuntimeError("unproven")):
            with mock.patch.object(experts_module, "run_mxfp4") as product:
                with self.assertRaisesRegex(RuntimeError, "unproven"):
                    fused_experts_mxfp4_scaled(x, *[None] * 6)
        product.assert_not_called()


if __name__ == "__main__":
    unittest.main()

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
    _accepts,
    _accepts_scaled,
    fused_experts_mxfp4_scaled,
    fused_experts_mxfp4_torch,
    place_experts,
    random_experts,
    require_true_scaled_product,
)
from sglang.kernels.ops.moe.fused_experts_mxfp4_sm90_triton import NUMBERS
from sglang.kernels.ops.moe.fused_experts_mxfp4_triton import LIFT, PLACED_NUMBERS, PLACED_WHOLE, TWICE
from sglang.kernels.ops.moe.tiles import TABLE, choose_tiles
from sglang.kernels.ops.quant.mxfp4 import (
    LARGEST_FLOAT32,
    NARROW,
    dequantize_mxfp4,
    place_codes,
    place_scales,
    quantize_mxfp4,
    round_e2m1,
    scales_of,
    unpack_eighths,
)
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.ptx import run_ptx
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


def placed_numbers(codes, scale, assembly=PLACED_NUMBERS):
    """What sm_90 makes of placed codes [64, 64] and scales [64, 4], one granule: float64 [64, 128]."""
    words = codes.view(64, 64).contiguous().view(torch.int32).long() & 0xFFFFFFFF
    powers = (scale.view(64, 4).long() * TWICE.value + LIFT.value).repeat(1, 4)
    registers = run_ptx(assembly.value, [None] * 4 + [words, powers, powers])
    halves = [registers[f"${i}"] >> shift & 0xFFFF for i in range(4) for shift in (0, 16)]
    numbers = [half.to(torch.int32).to(torch.int16).view(torch.bfloat16).double() for half in halves]
    # Register, half, row, thread, group -> row, group, register, thread, half.
    found = torch.stack(numbers).view(4, 2, 64, 4, 4).permute(2, 4, 0, 3, 1)
    return found.reshape(64, 128) * PLACED_WHOLE.value


class TestPlacedCodes(CustomTestCase):
    def test_every_code_beside_every_scale_that_is_taken(self):
        codes = torch.randint(0, 256, (64, 64), generator=torch.Generator().manual_seed(6)).to(torch.uint8)
        codes[:16] = torch.arange(16).repeat(64).view(16, 64) * 17
        kept = place_codes(codes)
        self.assertEqual((kept.shape, kept.dtype), (codes.shape, codes.dtype))
        for low in range(NARROW[0], NARROW[1] + 1, 4):
            scale = torch.arange(low, low + 4).clamp(max=NARROW[1]).to(torch.uint8).repeat(64, 1)
            wanted = dequantize_mxfp4(codes, scale).double()
            for assembly in (PLACED_NUMBERS, NUMBERS):
                self.assertTrue(torch.equal(placed_numbers(kept, place_scales(scale), assembly), wanted), low)
        self.assertNotEqual(PLACED_NUMBERS.value, NUMBERS.value)

    def test_two_scales_in_one_register(self):
        """Neighbours in a register may be of two groups, if the compiler lays them out so."""
        words = torch.full((1,), 0x7FFF7FFF)
        powers = [torch.tensor([byte * TWICE.value + LIFT.value]) for byte in (100, 130)]
        found = run_ptx(PLACED_NUMBERS.value, [None] * 4 + [words, *powers])["$0"]
        low, high = (int(found) >> shift & 0xFFFF for shift in (0, 16))
        self.assertEqual(high - low, 30 << 7)

    def test_granules(self):
        scale = torch.arange(128 * 8).view(128, 8)
        placed = place_scales(scale).flatten()
        for row, group in ((0, 0), (1, 3), (63, 4), (64, 0), (100, 7)):
            at = (row // 64 * 64 * 8) + group // 4 * 256 + row % 64 * 4 + group % 4
            self.assertEqual(int(placed[at]), int(scale[row, group]))

    def stacks(self, hidden=128, width=128):
        generator = torch.Generator().manual_seed(7)
        w13 = random_experts(2, 2 * width, hidden, generator)
        return [*w13, *random_experts(2, hidden, width, generator)]

    def test_experts_in_place(self):
        stacks = self.stacks()
        # A group of zeros, whatever its scale.
        stacks[0][1, 3, 16:32], stacks[1][1, 3, 1] = 0x80, 0
        before = [one.clone() for one in stacks]
        x, ids, weights = torch.zeros(1, 128).bfloat16(), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1)
        self.assertTrue(_accepts_scaled(x, *stacks, weights, ids))
        self.assertTrue(place_experts(*stacks))
        for at in (0, 2):
            for expert in range(2):
                self.assertTrue(torch.equal(stacks[at][expert], place_codes(before[at][expert])))
        self.assertEqual(int(stacks[1].min()), min(NARROW[0], int(before[1][before[1] > 0].min())))
        self.assertFalse(place_experts(*stacks), "a second time would place what is placed")
        self.assertTrue(_accepts(x, *stacks, weights, ids))
        self.assertFalse(_accepts(x.float(), *stacks, weights, ids), "tiles narrower than granules")
        self.assertFalse(_accepts_scaled(x, *stacks, weights, ids))
        self.assertFalse(_accepts(x, *stacks[:2], *before[2:], weights, ids), "one matrix alone")
        with self.assertRaisesRegex(ValueError, "placed for sm_90"):
            fused_experts_mxfp4_torch(x, *stacks, weights, ids)

    def test_experts_that_stay(self):
        for hidden, width in ((64, 128), (128, 64), (96, 128)):
            self.assertFalse(place_experts(*self.stacks(hidden, width)), (hidden, width))
        for byte in (NARROW[0] - 1, NARROW[1] + 1, 255):
            stacks = self.stacks()
            stacks[2][0, 5, :16], stacks[3][0, 5, 0] = 1, byte
            before = [one.clone() for one in stacks]
            with self.assertLogs("sglang.kernels.ops.moe.fused_experts_mxfp4", "WARNING"):
                self.assertFalse(place_experts(*stacks), byte)
            self.assertTrue(all(map(torch.equal, stacks, before)))


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
        # A large number is not cut, and what is below half of the least one becomes zero.
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

"""The emulator of AMD's machine code: its result without tinygrad, and which errors it finds with it.

Without a checkout of tinygrad only the first part runs; the rest is skipped, and says so.
"""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl
from triton import knobs

from sglang.srt.environ import envs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=10, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
SCRIPT = REPO / "scripts" / "amd_emulate.py"
# A kernel that is collected asks the driver, which is gone, to unload it.
KERNELS = []
CHECKOUT = envs.SGLANG_EMULATOR_TINYGRAD.get()


def emulate(*arguments, tinygrad=""):
    environment = {**os.environ, "SGLANG_EMULATOR_TINYGRAD": tinygrad}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


class TestWithoutTinygrad(CustomTestCase):
    def test_says_that_nothing_was_run(self):
        for arguments in ((), ("--tinygrad", str(REPO))):
            done = emulate("mhc.hc_pre", *arguments)
            self.assertEqual(done.returncode, 3, done.stderr)
            self.assertRegex(done.stdout, "^NOT RUN: 0 cases of 1 ops: .*tinygrad")
            self.assertNotIn("agree", done.stdout)

    def test_unknown_op(self):
        done = emulate("mhc.nothing")
        self.assertEqual(done.returncode, 1)
        self.assertIn("mhc.nothing", done.stderr)


class TestFormats(CustomTestCase):
    def test_msgpack(self):
        """Every kind that the metadata of a code object uses."""
        from sglang.test.amd_emulator.code_object import unpack_msgpack

        for data, value in (
            (b"\x07", 7), (b"\xff", -1), (b"\xc0", None), (b"\xc3", True), (b"\xa2ab", "ab"), (b"\xcc\xc8", 200),
            (b"\xcd\x01\x00", 256), (b"\xce\x00\x01\x00\x00", 65536), (b"\xcf" + b"\0" * 7 + b"\x05", 5),
            (b"\xd0\x80", -128), (b"\xd1\xff\x00", -256), (b"\xd9\x03abc", "abc"), (b"\xda\x00\x01x", "x"),
            (b"\x92\x01\x02", [1, 2]), (b"\xdc\x00\x01\x09", [9]), (b"\x81\xa1k\x03", {"k": 3}),
            (b"\xde\x00\x01\xa1k\x91\x04", {"k": [4]}),
        ):  # fmt: skip
            self.assertEqual(unpack_msgpack(data), (value, len(data)))
        with self.assertRaisesRegex(ValueError, "0xc1"):
            unpack_msgpack(b"\xc1")

    def test_local_memory_operands(self):
        """Address, data, offsets and size in bytes, parts, and where in the register the data begins."""
        from sglang.test.amd_emulator.instructions import LDS_STORE, replaced

        class DS:
            """An instruction of this format, as tinygrad's decoder calls it."""

        # acc, offset0 3, offset1 2, then the registers.
        raw = (0x02000203 | 7 << 32 | 8 << 40 | 12 << 48).to_bytes(8, "little")
        for name, wanted in (
            ("B8_D16_HI", [7, 8, 12, 0x203, 0, 1, 1, 16]), ("B32", [7, 8, 12, 0x203, 0, 4, 1, 0]),
            ("B64", [7, 8, 12, 0x203, 0, 8, 1, 0]), ("B96", [7, 8, 12, 0x203, 0, 12, 1, 0]),
        ):  # fmt: skip
            self.assertEqual(replaced(f"DS_WRITE_{name}", DS(), raw), (LDS_STORE, wanted), name)
        for name, first, second, size in (
            ("2_B32", 12, 8, 4), ("2_B64", 24, 16, 8), ("2ST64_B32", 768, 512, 4), ("2ST64_B64", 1536, 1024, 8),
        ):  # fmt: skip
            wanted = [7, 8, 12, first, second, size, 2, 0]
            self.assertEqual(replaced(f"DS_WRITE{name}", DS(), raw), (LDS_STORE, wanted), name)
        self.assertIsNone(replaced("DS_READ2ST64_B64", DS(), raw))


def softmax(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    at = tl.program_id(0) * width + cols
    x = tl.load(x_ptr + at, mask=cols < width, other=-float("inf"))
    x = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + at, x / tl.sum(x, axis=0), mask=cols < width)


def convert(x_ptr, small_ptr, back_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    small = tl.load(x_ptr + at).to(small_ptr.dtype.element_ty)
    tl.store(small_ptr + at, small)
    tl.store(back_ptr + at, small.to(back_ptr.dtype.element_ty))


def check_conversions(arch, dtype):
    """AssertionError unless conversions from and to ``dtype``, run for ``arch``, are torch's."""
    from sglang.test.amd_emulator.driver import emulated
    from sglang.test.amd_emulator.emulator import use_tinygrad

    use_tinygrad(Path(CHECKOUT))
    values = torch.randn(7168, generator=torch.Generator().manual_seed(3)).exp2().clamp(max=200)
    values = values * 2.0 ** -torch.randint(0, 14, (7168,), generator=torch.Generator().manual_seed(4))
    x = torch.cat((values[:3584], -values[3584:], torch.arange(-512, 512) / 1024))
    for wide in (torch.float32, torch.bfloat16):
        kernel = triton.jit(convert)
        KERNELS.append(kernel)
        small, back = torch.empty(8192, dtype=dtype), torch.empty(8192, dtype=wide)
        with emulated(arch):
            kernel[(8,)](x.to(wide), small, back, BLOCK=1024, num_warps=4)
        wanted = x.to(wide).to(dtype)
        assert torch.equal(small.view(torch.uint8), wanted.view(torch.uint8)), (arch, wide)
        assert torch.equal(back, wanted.to(wide)), (arch, wide)


def turn(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    x = tl.load(x_ptr + row[:, None] * COLUMNS + column[None, :])
    tl.store(out_ptr + column[:, None] * ROWS + row[None, :], tl.trans(x))


def through_accumulation_registers(assembly):
    """What local memory is written from and read to is in registers for accumulation, of numbers of their own."""

    def moved(match):
        kind, registers = match["kind"], re.findall(r"v(?:(\d+)|\[(\d+):(\d+)\])", match["operands"])
        data = registers[1:] if kind == "write" else registers[:1]
        names, moves = [], []
        for place, (one, low, high) in enumerate(data):
            first, last, base = int(one or low), int(one or high), 200 + 4 * place
            names.append(f"a{base}" if one else f"a[{base}:{base + last - first}]")
            order = (f"v_accvgpr_{kind}_b32 " + ("a{1}, v{0}" if kind == "write" else "v{0}, a{1}") + "\n").format
            moves += [order(register, base + register - first) for register in range(first, last + 1)]
        address = "v" + registers[0 if kind == "write" else 1][0]
        operands = [address, *names] if kind == "write" else [*names, address]
        changed = f"ds_{kind}{match['form']} {', '.join(operands)}{match['offsets']}\n"
        return "".join([*moves, changed] if kind == "write" else [changed, *moves])

    line = r"ds_(?P<kind>write|read)(?P<form>\S+) (?P<operands>v[^ ,\n]+(?:, v[^ ,\n]+)+)(?P<offsets>[^\n]*)\n"
    return re.sub(line, moved, assembly)


@unittest.skipUnless(CHECKOUT, "not run: SGLANG_EMULATOR_TINYGRAD names no checkout of tinygrad")
class TestWithTinygrad(CustomTestCase):
    """Rows over four waves need their barriers, their waits for memory and each of their instructions."""

    def run_changed(self, function, arch, change, grid, *args, **options):
        """What the kernel's code for ``arch``, whose assembly is changed before it becomes code, executed."""
        from triton.backends.amd.compiler import HIPBackend

        from sglang.test.amd_emulator.driver import emulated
        from sglang.test.amd_emulator.emulator import use_tinygrad

        use_tinygrad(Path(CHECKOUT))
        kernel = triton.jit(function)
        KERNELS.append(kernel)
        real = HIPBackend.make_hsaco
        planted = staticmethod(lambda assembly, *others: real(change(assembly), *others))
        folder = self.enterContext(tempfile.TemporaryDirectory())
        with knobs.cache.scope(), mock.patch.object(HIPBackend, "make_hsaco", planted), emulated(arch) as driver:
            knobs.cache.dir = folder
            kernel[grid](*args, **options)
        return driver.ran[0].run

    def error(self, arch, change=lambda assembly: assembly):
        """The largest error of rows' softmax by code that is changed."""
        x, out = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 1000)
        run = self.run_changed(softmax, arch, change, (3,), x, out, 1000, BLOCK=1024, num_warps=4)
        self.assertGreater(run.instructions, 500)
        return float((out - x.softmax(-1)).abs().max())

    def test_right_code_is_right(self):
        for arch in ("gfx942", "gfx950"):
            self.assertLess(self.error(arch), 1e-7)

    def test_sees_a_wrong_instruction(self):
        def plant(assembly):
            self.assertIn("v_exp_f32_e32", assembly)
            return assembly.replace("v_exp_f32_e32", "v_sqrt_f32_e32", 1)

        error = self.error("gfx950", plant)
        self.assertTrue(error > 1e-4 or error != error, error)

    def test_sees_missing_barriers(self):
        def plant(assembly):
            self.assertIn("s_barrier", assembly)
            return re.sub(r"\n\s+s_barrier", "", assembly)

        error = self.error("gfx950", plant)
        self.assertTrue(error > 1e-4 or error != error, error)

    def test_does_not_see_missing_waits(self):
        """Memory has no latency here: the documentation says that no result covers a wait."""

        def plant(assembly):
            self.assertIn("s_waitcnt vmcnt", assembly)
            return re.sub(r"\n\s+s_waitcnt[^\n]*", "", assembly)

        self.assertLess(self.error("gfx950", plant), 1e-7)

    def test_eight_bit_conversions(self):
        """To the architecture's own 8-bit floats and back, in every exponent, at ties and zeros: torch's numbers."""
        # A process each: see scripts/amd_emulate.py.
        for arch, dtype in (("gfx950", torch.float8_e4m3fn), ("gfx942", torch.float8_e4m3fnuz)):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(check_conversions, arch, dtype).result()

    def turned(self, arch, dtype, shape, num_warps, change):
        """Whether changed code transposes a matrix [ROWS, COLUMNS] rightly, and how often each instruction ran."""
        # Every byte differs from its neighbours.
        x = (torch.arange(shape[0] * shape[1]) * 0x9E3779B97F4A7C15).to(dtype).reshape(shape)
        out = torch.zeros(shape[1], shape[0], dtype=dtype)
        options = {"ROWS": shape[0], "COLUMNS": shape[1], "num_warps": num_warps}
        run = self.run_changed(turn, arch, change, (1,), x, out, **options)
        return torch.equal(out, x.T), run.by_kind

    def test_local_memory_from_accumulation_registers(self):
        """Triton 3.6 stores results of products to local memory from where the matrix unit left them."""
        seen = set()
        for dtype, shape, num_warps in (
            (torch.uint8, (64, 64), 1), (torch.int16, (64, 64), 1), (torch.int32, (16, 16), 1),
            (torch.int32, (64, 64), 1), (torch.int32, (64, 128), 4), (torch.int64, (16, 16), 1),
            (torch.int64, (64, 64), 1), (torch.int64, (32, 128), 1),
        ):  # fmt: skip
            for arch in ("gfx942", "gfx950"):
                right, ran = self.turned(arch, dtype, shape, num_warps, through_accumulation_registers)
                self.assertTrue(right, (arch, dtype, shape))
                for kind in ("write", "read"):
                    self.assertTrue(any(name.startswith(f"v_accvgpr_{kind}") for name in ran), ran)
                seen |= {name for name in ran if name.startswith("ds_write")}
        # Others come with one version of Triton and not with another: test_local_memory_operands reads them.
        forms = ("b8", "b8_d16_hi", "b16", "b16_d16_hi", "b128")
        self.assertLessEqual({f"ds_write_{form}" for form in forms} | {"ds_write2_b32", "ds_write2_b64"}, seen)

    def test_refuses_other_uses_of_accumulation_registers(self):
        """What would take a vector register in place of one for accumulation is not run."""
        from sglang.test.amd_emulator.emulator import EmulatorError

        for instruction in (
            "ds_add_u32 v0, a0", "ds_bpermute_b32 a0, v1, a2", "ds_swizzle_b32 a0, v1 offset:1",
            "global_atomic_add v[0:1], a0, off",
        ):  # fmt: skip

            def plant(assembly, instruction=instruction):
                return re.sub(r"(\n\s+)(ds_write)", rf"\1{instruction}\1\2", assembly, count=1)

            with self.assertRaisesRegex(EmulatorError, "of an accumulation register", msg=instruction):
                self.turned("gfx942", torch.int32, (16, 16), 1, plant)

    def test_ops_over_their_cases(self):
        """The corner cases of fused mHC between sub-blocks, on both architectures."""
        done = emulate("mhc.hc_post_pre", tinygrad=CHECKOUT)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertIn("36 of 36 cases ran", done.stdout)

    def test_a_wrong_kernel_disagrees(self):
        """The same with a source that lacks a term: the exit status shows it."""
        source = (REPO / "python/sglang/kernels/ops/mhc/mhc_triton.py").read_text()
        self.assertEqual(source.count("comb_at + 12"), 1)
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "sglang"
            shutil.copytree(REPO / "python" / "sglang", package, ignore=shutil.ignore_patterns("__pycache__"))
            (package / "kernels/ops/mhc/mhc_triton.py").write_text(source.replace("comb_at + 12", "comb_at + 8"))
            with mock.patch.dict(os.environ, {"PYTHONPATH": folder}):
                done = emulate("mhc.hc_post", "--arch", "gfx950", tinygrad=CHECKOUT)
        self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
        self.assertIn("DISAGREES 33x4x64", done.stdout)


if __name__ == "__main__":
    unittest.main()

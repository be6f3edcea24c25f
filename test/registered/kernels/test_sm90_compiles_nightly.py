"""Kernels in Gluon compile for sm_90 without a GPU, as launched, and fit the shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
import unittest
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from triton.backends.nvidia.compiler import get_ptxas

from sglang.kernels.ops.attention import launchers, tiles
from sglang.kernels.ops.attention.tiles import RowShape
from sglang.kernels.ops.moe import fused_experts, fused_experts_mxfp4
from sglang.kernels.ops.moe.fused_experts import fused_experts_triton
from sglang.kernels.ops.moe.fused_experts_fp8 import fused_experts_fp8_triton
from sglang.test.amd_gate.driver import Launch, compile_only
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=90, suite="nightly-cpu", nightly=True)

# Of a program on an H100 or H200.
SHARED_BYTES = 227 << 10


def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


# What a warp does between a meeting of its group (bar.sync) and one thread's word for all of them.
MEETING = re.compile(r"\b(bar|barrier)(\.cta)?\.sync\b")
WORK = re.compile(r"mbarrier\.try_wait|wgmma|ld\.shared|st\.shared|ldmatrix|stmatrix|^\$L__BB|\bbra\b")


def arrivals_without_meeting(assembly: str) -> tuple[int, list[str]]:
    """How often one thread arrives at a barrier for its group of warps, and where these have not met before."""
    met, count, alone = False, 0, list[str]()
    for line in assembly.splitlines():
        if MEETING.search(line):
            met = True
        elif WORK.search(line):
            met = False
        elif "mbarrier.arrive.shared" in line or "mbarrier.arrive.expect" in line:
            count += 1
            alone += [] if met else [line]
    return count, alone


def assert_groups_meet(case: unittest.TestCase, launch: Launch) -> None:
    """A slot is free when all warps of a group have read it; where no product makes them wait, the compiler does."""
    count, alone = arrivals_without_meeting(launch.assembly)
    case.assertGreater(count, 4)
    case.assertEqual(alone, [])
    case.assertEqual(len(arrivals_without_meeting(MEETING.sub("nop", launch.assembly))[1]), count)


class TestSm90Compiles(CustomTestCase):
    def test_at_deepseek_v3_s_sizes(self) -> None:
        for dtype, limit in ((torch.bfloat16, None), (torch.float16, 7.0)):
            with self.subTest(dtype=dtype):
                self.check(self.launches(8192, 7168, 2048, 256, 8, dtype, limit))

    def test_at_the_smallest_sizes(self) -> None:
        """One tile per block, one step per tile, and one expert per token."""
        self.check(self.launches(128, 256, 128, 4, 1, torch.float32, None))

    def test_16_bits_at_the_sizes_of_served_models(self) -> None:
        dtype = torch.bfloat16
        for hidden, width, experts, top_k, limit in (
            (2048, 1408, 64, 6, None),
            (7168, 2048, 256, 8, 7.0),
            (2048, 512, 256, 8, None),
        ):
            x, w13 = empty(8192, hidden, dtype=dtype), empty(experts, 2 * width, hidden, dtype=dtype)
            w2, ids = empty(experts, hidden, width, dtype=dtype), empty(8192, top_k, dtype=torch.int32)
            with self.subTest(width=width), self.platform(), compile_only("sm_90") as driver:
                fused_experts_triton(x, w13, w2, empty(8192, top_k), ids, limit)
                launches = [launch for launch in driver.launches if launch.kernel.startswith("many_tokens")]
                self.check(launches)
                for launch in launches:
                    # The assembler keeps the sums in registers and does not serialise products.
                    self.assertNotRegex(self.assemble(launch.assembly).replace(" 0 bytes spill", ""), "bytes spill|C75")

    def assemble(self, text: str) -> str:
        """What the assembler says of PTX."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "kernel.ptx")
            source.write_text(text)
            command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(folder, "kernel"))]
            return subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def platform(self) -> mock._patch:
        return mock.patch.object(fused_experts, "current_platform", SimpleNamespace(arch="sm_90"))

    def test_other_sizes_take_triton_s_kernel(self) -> None:
        launches = self.launches(128, 384, 128, 4, 1, torch.bfloat16, None)
        self.assertEqual([launch.kernel for launch in launches], ["many_tokens_kernel"] * 2)

    def test_four_bit_experts(self) -> None:
        """Of one token, of few, and of ordered pairs."""
        for tokens, limit in ((1, None), (8, 7.0), (32, None)):
            bytes_of = partial(empty, dtype=torch.uint8)
            stacked = [bytes_of(256, 4096, 3584), bytes_of(256, 4096, 224)]
            stacked += [bytes_of(256, 7168, 1024), bytes_of(256, 7168, 64)]
            for codes in stacked:
                codes.is_placed = True  # type: ignore[attr-defined]
            x = empty(tokens, 7168, dtype=torch.bfloat16)
            routing = empty(tokens, 8), empty(tokens, 8, dtype=torch.int32)
            platform = mock.patch.object(fused_experts_mxfp4, "current_platform", SimpleNamespace(arch="sm_90"))
            with self.subTest(tokens=tokens), platform, compile_only("sm_90") as driver:
                fused_experts_mxfp4.fused_experts_mxfp4_triton(x, *stacked, *routing, limit)
                launches = [one for one in driver.launches if one.kernel == "few_pairs_mxfp4_kernel"]
                self.assertEqual(len(launches), 2)
                for launch in launches:
                    # Five programs of four warps on a multiprocessor, or more of two.
                    self.assertLessEqual(launch.metadata["shared"], SHARED_BYTES // 5 - 1024)
                    self.assertIn("mma.sync.aligned.m16n8k16", launch.assembly)

    def launches(
        self, tokens: int, hidden: int, width: int, experts: int, top_k: int, dtype: torch.dtype, limit: float | None
    ) -> list[Launch]:
        """Those of the two products."""
        fp8 = torch.float8_e4m3fn
        stacked = []
        for rows, columns in ((2 * width, hidden), (hidden, width)):
            stacked += [empty(experts, rows, columns, dtype=fp8), empty(experts, rows // 128, columns // 128)]
        routing = empty(tokens, top_k), empty(tokens, top_k, dtype=torch.int32)
        x = empty(tokens, hidden, dtype=fp8), empty(tokens, hidden // 128)
        with self.platform(), compile_only("sm_90") as driver:
            fused_experts_fp8_triton(x[0], *stacked, *routing, x[1], dtype, limit)
            return [launch for launch in driver.launches if launch.kernel.startswith("many_tokens")]

    def check(self, launches: list[Launch]) -> None:
        self.assertEqual([launch.kernel for launch in launches], ["many_tokens_sm90_kernel"] * 2)
        for launch in launches:
            self.assertLessEqual(launch.metadata["shared"], SHARED_BYTES)
            self.assertIn("wgmma.mma_async", launch.assembly)
            assert_groups_meet(self, launch)


class TestDecodeOfManyHeadsCompiles(CustomTestCase):
    def test_whole_rows_and_parts(self) -> None:
        shape = RowShape.of(576, 512, value_is_key=True)
        for module in (launchers, tiles):
            platform = SimpleNamespace(arch="sm_90", kind="cuda")
            self.enterContext(mock.patch.object(module, "current_platform", platform))
        for dtype in (torch.bfloat16, torch.float16):
            k = empty(4096, 1, 576, dtype=dtype)
            for batch in (32, 64):
                table = empty(64, 2048, dtype=torch.int32), empty(batch, dtype=torch.int64)
                with compile_only("sm_90") as driver:
                    lens = empty(batch, dtype=torch.int64)
                    launchers.launch_parts(empty(batch, 128, 576, dtype=dtype), k, k, *table, lens, 0.1, shape)
                (launch,) = driver.launches
                self.assertEqual(launch.kernel, "decode_heads_sm90_kernel")
                self.assertLessEqual(launch.metadata["shared"], SHARED_BYTES)
                # Of each of two groups: 9 tiles in 4 steps, and 2 blocks of 4 tiles in 2.
                self.assertEqual(launch.assembly.count("wgmma.mma_async"), 2 * (9 * 4 + 2 * 4 * 2))
                assert_groups_meet(self, launch)


if __name__ == "__main__":
    unittest.main()

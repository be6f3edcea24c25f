"""The AMD gate: every Triton kernel compiles for gfx942 and gfx950 without a spill, and a bad one is found."""

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch
import triton
import triton.language as tl

from sglang.kernels.launch import triton_impl
from sglang.kernels.registry import REGISTRY
from sglang.kernels.spec import Impl, Op
from sglang.test.amd_gate.driver import LDS_BYTES, Launch, compile_only
from sglang.test.amd_gate.expectations import EXPECTED, MFMA_BF16, expected_instructions
from sglang.test.amd_gate.gate import ARCHS, Recorded, RowCollector, check, load_table, save_table, uncovered_ops
from sglang.test.amd_gate.resources import Resources, drift, occupancy, read_resources, unfit, violations
from sglang.test.amd_gate.shape_walk import WALKED_MODELS
from sglang.test.amd_gate.walk import WalkStep, describe_error
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.op_cases import Case
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=30, suite="stage-b-test-cpu")

KEYS = {"kernel", "arch", "triton", "shape", "vgpr", "agpr", "lds", "spills", "scratch", "occupancy"}


@triton.jit
def product_kernel(x_ptr, y_ptr, out_ptr, steps, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    row, col, k = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :], tl.arange(0, DEPTH)
    acc = tl.zeros([SIZE, SIZE], tl.float32)
    for step in range(steps):
        x = tl.load(x_ptr + row * DEPTH + k[None, :] + step)
        y = tl.load(y_ptr + k[:, None] * SIZE + col + step)
        acc = tl.dot(x, y, acc)
    tl.store(out_ptr + row * SIZE + col, acc)


def launch_product(size, depth, num_warps):
    """``size`` 256 on one wave holds 1024 sums a lane, twice the registers there are."""

    def run(x):
        shape = {"SIZE": size, "DEPTH": depth}
        product_kernel[(1,)](x, x, x.to(torch.float32), 8, **shape, num_warps=num_warps, num_stages=2)
        return x

    return run


def compiled(arch, run):
    with compile_only(arch) as driver:
        run(torch.empty(1 << 20, dtype=torch.bfloat16, device="meta"))
    return driver.launches[0]


class TestBadKernelsAreCaught(CustomTestCase):
    def test_a_planted_spilling_kernel_turns_the_gate_red(self):
        def accepts(x):
            return True

        op = Op("planted.spill", triton_impl(launch_product(256, 16, 1), accepts), Impl("torch", lambda x: x))
        try:
            case = Case("t1", (torch.empty(1 << 20, dtype=torch.bfloat16, device="meta"),))
            (row,) = check("gfx942", [(op, case)], {}).rows
            self.assertGreater(row.resources.spills, 0)
            self.assertGreater(row.resources.scratch, 0)
            self.assertTrue(any("spills" in problem for problem in row.problems), row.problems)
            self.assertTrue(any("scratch" in problem for problem in row.problems), row.problems)
            with tempfile.TemporaryDirectory() as folder:
                save_table([row], Path(folder) / "table.json")
                table = load_table(Path(folder) / "table.json")
            recorded = table[triton.__version__]["gfx942"][row.key]
            self.assertEqual(recorded, Recorded(row.resources, ""), "what fails is compiled again at every run")
        finally:
            del REGISTRY.ops["planted.spill"]

    def test_local_memory_past_the_limit_is_caught_where_it_is_past(self):
        launch = compiled("gfx950", launch_product(32, 32, 4))
        launch = dataclasses.replace(launch, metadata={**launch.metadata, "shared": LDS_BYTES["gfx942"] + 1})
        self.assertEqual(violations(launch, "gfx950", ()), [])
        (problem,) = violations(launch, "gfx942", ())
        self.assertIn("LDS", problem)

    def test_a_missing_instruction_is_caught(self):
        launch = compiled("gfx942", launch_product(32, 32, 4))
        self.assertEqual(violations(launch, "gfx942", (MFMA_BF16,)), [])
        (problem,) = violations(launch, "gfx942", (r"v_mfma_f32_\d+x\d+x\d+_fp8",))
        self.assertIn("lacks the instruction", problem)

    def test_other_waves_and_too_many_lanes_are_caught(self):
        launch = compiled("gfx942", launch_product(32, 32, 4))
        text = launch.assembly.replace(".wavefront_size: 64", ".wavefront_size: 32")
        self.assertIn("waves of 32", violations(dataclasses.replace(launch, assembly=text), "gfx942", ())[0])
        wide = dataclasses.replace(launch, metadata={**launch.metadata, "num_warps": 32})
        self.assertIn("2048 lanes", violations(wide, "gfx942", ())[0])

    def test_a_code_object_without_notes_is_an_error(self):
        launch = Launch("nothing", (1, 1, 1), {"shared": 0, "num_warps": 4, "warp_size": 64}, "s_endpgm")
        with self.assertRaisesRegex(ValueError, "vgpr_count"):
            read_resources(launch, "gfx942")

    def test_drift(self):
        before = Resources(vgpr=100, agpr=0, lds=1000, spills=0, scratch=0, occupancy=4, sgpr_spills=0)
        self.assertEqual(drift(before, before), [])
        for change in ({"vgpr": 110}, {"lds": 1100}, {"vgpr": 50}, {"occupancy": 5}, {"sgpr_spills": 8}):
            self.assertEqual(drift(dataclasses.replace(before, **change), before), [], change)
        for change in ({"vgpr": 111}, {"lds": 1101}, {"occupancy": 3}, {"sgpr_spills": 9}):
            self.assertEqual(len(drift(dataclasses.replace(before, **change), before)), 1, change)

    def test_occupancy(self):
        # 512 registers a lane in eights, at most 8 waves; workgroups of 4 waves share 64 or 160 KiB over 4 SIMDs.
        for arch, vgpr, lds, warps, waves in (
            ("gfx942", 64, 0, 4, 8), ("gfx942", 65, 0, 4, 7), ("gfx942", 257, 0, 4, 1), ("gfx942", 32, 20480, 4, 3),
            ("gfx950", 32, 20480, 4, 8), ("gfx942", 32, 65536, 8, 2), ("gfx942", 32, 65537, 8, 0),
        ):  # fmt: skip
            self.assertEqual(occupancy(arch, vgpr, lds, warps), waves, (arch, vgpr, lds, warps))


class TestKnownCode(CustomTestCase):
    @staticmethod
    def launch_of(size, depth, num_warps, arch="gfx942", known=False):
        with compile_only(arch, lambda kernel, digest: known) as driver:
            launch_product(size, depth, num_warps)(torch.empty(1 << 20, dtype=torch.bfloat16, device="meta"))
        return driver.launches[0]

    def test_known_code_is_not_compiled_and_has_the_same_digest(self):
        skipped = self.launch_of(16, 64, 2, known=True)
        self.assertEqual((skipped.kernel, skipped.assembly), ("product_kernel", ""))
        compiled = self.launch_of(16, 64, 2)
        self.assertIn("gfx942", compiled.assembly)
        self.assertEqual(compiled.digest, skipped.digest)

    def test_every_part_of_the_code_changes_the_digest(self):
        changes = ({}, {"size": 32}, {"num_warps": 4}, {"arch": "gfx950"})
        code = {"size": 64, "depth": 128, "num_warps": 2, "known": True}
        digests = [self.launch_of(**{**code, **change}).digest for change in changes]
        with mock.patch.object(product_kernel, "hash", "another source"):
            digests.append(self.launch_of(**code).digest)
        self.assertEqual(len(set(digests)), len(changes) + 1, digests)

    def test_a_recorded_row_stands_for_its_code_until_what_is_expected_of_it_changes(self):
        launch = self.launch_of(16, 32, 2)
        fresh = RowCollector("gfx942", {})
        fresh.add(launch, "t1")
        (row,) = fresh.rows.values()
        recorded = {row.key: Recorded(dataclasses.replace(row.resources, lds=LDS_BYTES["gfx942"] + 4), row.digest)}
        found = RowCollector("gfx942", recorded)
        self.assertTrue(found.known("product_kernel", launch.digest))
        found.add(dataclasses.replace(launch, assembly=""), "another name", "some model")
        (again,) = found.rows.values()
        self.assertEqual((again.key, again.models, again.covered), (row.key, ["some model"], False))
        self.assertIn("LDS", again.problems[0])
        with mock.patch.dict(EXPECTED, {"product_kernel": (MFMA_BF16,)}):
            self.assertFalse(found.known("product_kernel", launch.digest))

    def test_rows_of_one_name_are_told_apart(self):
        found = RowCollector("gfx942", None)
        for size in (16, 32):
            found.add(self.launch_of(size, 32, 2), "t1")
        keys = [row.key for row in found.rows.values()]
        self.assertEqual(keys, ["product_kernel @ t1 grid 1", "product_kernel @ t1 grid 1 #2"])


class TestWalk(CustomTestCase):
    def test_a_fall_back_and_a_read_on_the_host_are_named(self):
        def refuses(x):
            return x.shape[0] > 1

        fits = torch.empty(1 << 20, dtype=torch.bfloat16, device="meta")
        op = Op("planted.walk", triton_impl(launch_product(16, 16, 1), refuses), Impl("torch", lambda x: x + 1))
        alone = Op("planted.alone", Impl("torch", lambda x: x))

        def walk():
            op(fits)
            alone(fits)
            yield WalkStep("tiny", "decode 8")
            op(fits[:1])
            yield WalkStep("tiny", "decode 1")
            try:
                bool(fits.any())
            except RuntimeError as error:
                yield WalkStep("tiny", "sample", describe_error(error))

        try:
            found = check("gfx942", [], {}, walk)
        finally:
            del REGISTRY.ops["planted.walk"], REGISTRY.ops["planted.alone"]
        self.assertEqual([(row.models, row.covered) for row in found.rows], [(["tiny"], False)])
        self.assertEqual(found.torch_only, {"planted.alone": "tiny decode 8"})
        fell, read = found.problems
        self.assertEqual(fell, "gfx942 tiny decode 1 (1): planted.walk falls back to its torch reference")
        self.assertIn("gfx942 tiny sample: RuntimeError", read)

    def test_a_case_that_fails_hides_no_other(self):
        def breaks(x):
            raise ValueError("planted")

        op = Op("planted.break", triton_impl(breaks, lambda x: True), Impl("torch", lambda x: x))
        try:
            x = torch.empty(4, device="meta")
            found = check("gfx942", [(op, Case("t1", (x,))), (op, Case("t2", (x,)))], {})
        finally:
            del REGISTRY.ops["planted.break"]
        (problem,) = found.problems
        self.assertIn("planted.break t1 and 1 more: ValueError", problem)


class TestDriver(CustomTestCase):
    def test_architectures_do_not_share_compiled_kernels(self):
        run = launch_product(32, 32, 4)
        texts = [compiled(arch, run).assembly for arch in (*ARCHS, "gfx942", "sm_90")]
        targets = [re.findall(r"gfx942|gfx950|sm_90", text)[0] for text in texts]
        self.assertEqual(targets, [*ARCHS, "gfx942", "sm_90"])
        products = [set(re.findall(r"v_mfma\w+|mma\.sync", text)) for text in texts]
        self.assertEqual(products[0], products[2])
        self.assertNotEqual(products[0], products[1])

    def test_the_previous_driver_comes_back(self):
        before = triton.runtime.driver._active
        with self.assertRaisesRegex(RuntimeError, "inside"), compile_only("gfx942"):
            raise RuntimeError("inside")
        self.assertIs(triton.runtime.driver._active, before)


class TestTheTree(CustomTestCase):
    def test_every_triton_op_declares_serving_shapes(self):
        self.assertEqual(uncovered_ops(), [])

    def test_every_kernel_passes(self):
        command = [sys.executable, "-m", "sglang.kernels", "--amd-report", "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        bad = [line for line in done.stderr.splitlines() if line.startswith("FAIL ")]
        self.assertEqual(bad, [], f"{len(bad)} problems")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual([row for row in rows if row["problems"]], [])
        self.assertTrue(all(row.keys() >= KEYS for row in rows))
        self.assertEqual({row["arch"] for row in rows}, set(ARCHS))
        self.assertEqual({row["triton"] for row in rows}, {triton.__version__})
        for arch, model in itertools.product(ARCHS, (model.name for model in WALKED_MODELS)):
            met = {row["kernel"] for row in rows if row["arch"] == arch and model in row["models"]}
            attention = ("decode_", "extend_kernel")
            if model.startswith("v4"):
                attention = ("sparse_attention_", "score_entries_", "pick_entries_", "compress_", "prepare_compressed_")
            kinds = (*attention, "many_tokens_", "router_", "rms_norm_", "greedy_kernel")
            self.assertEqual([k for k in kinds if not any(name.startswith(k) for name in met)], [], (arch, model))
        compared = triton.__version__ in load_table()
        print(f"{len(rows)} kernels, triton {triton.__version__}, drift {'checked' if compared else 'NOT checked'}")

    def test_each_recorded_triton_has_all_rows(self) -> None:
        """AMD's images have an older one than CI: its rows are made with its wheel first on PYTHONPATH."""
        (newest, rows), *others = sorted(load_table().items(), reverse=True)
        for version, older in others:
            for arch in ARCHS:
                self.assertEqual(older[arch].keys() ^ rows[arch].keys(), set(), f"{version} and {newest}, {arch}")

    def test_no_recorded_row_is_unfit(self) -> None:
        """Neither version spills; a row whose code had any problem has no digest."""
        for version, archs in load_table().items():
            for arch, rows in archs.items():
                bad = {key: unfit(row.resources, arch) for key, row in rows.items()}
                self.assertEqual({key: why for key, why in bad.items() if why}, {}, f"{version}, {arch}")
                self.assertEqual([key for key, row in rows.items() if not row.digest], [], f"{version}, {arch}")

    def test_products_are_expected_on_the_matrix_unit(self):
        self.assertIn(MFMA_BF16, expected_instructions("many_tokens_kernel", "moe.fused_experts v3 t8"))
        self.assertEqual(expected_instructions("many_tokens_kernel", "moe.fused_experts qwen35 t8 fp32"), ())


if __name__ == "__main__":
    unittest.main()

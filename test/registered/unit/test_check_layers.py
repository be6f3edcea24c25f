"""scripts/check_layers.py finds violations of each kind, and none in allowed code."""

import importlib
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "check_layers.py"
sys.path.insert(0, str(SCRIPT.parent))
# Called rather than run for each tree: a process takes longer than a check.
LAYERS = importlib.import_module("check_layers")


class TestCheckLayers(CustomTestCase):
    def check(self, files: dict[str, str]) -> tuple[int, list[str]]:
        """(1 or 0, violations) for a tree of the given files, paths relative to sglang/."""
        with tempfile.TemporaryDirectory() as folder:
            for name, text in files.items():
                path = Path(folder) / "sglang" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
            violations, _ = LAYERS.check_tree(Path(folder))
            return int(bool(violations)), [str(violation) for violation in violations]

    def assert_violation(self, name: str, text: str, expected: str, others: dict[str, str] | None = None):
        status, violations = self.check({**(others or {}), name: text})
        self.assertEqual((status, len(violations)), (1, 1), violations)
        self.assertTrue(violations[0].startswith(f"sglang/{name}:"), violations)
        self.assertIn(expected, violations[0])

    def assert_clean(self, name: str, text: str, others: dict[str, str] | None = None):
        self.assertEqual(self.check({**(others or {}), name: text}), (0, []))

    def test_upwards_however_it_is_written(self):
        scheduler = {"srt/managers/__init__.py": "", "srt/managers/scheduler.py": ""}
        name = "srt/layers/linear.py"
        for text in (
            "import sglang.srt.managers.scheduler",
            "from sglang.srt.managers.scheduler import Scheduler",
            "from sglang.srt.managers import scheduler",
            "from ..managers import scheduler",
            "def f():\n    from sglang.srt.managers import scheduler",
            "if TYPE_CHECKING:\n    import sglang.srt.managers.scheduler",
            "import importlib\nm = importlib.import_module('sglang.srt.managers.scheduler')",
        ):
            with self.subTest(text):
                self.assert_violation(name, text, "imports upwards: sglang.srt.managers", scheduler)

    def test_line_is_that_of_the_import(self):
        _, violations = self.check({"srt/utils/a.py": "x = 1\n\nimport sglang.srt.managers.scheduler\n"})
        self.assertTrue(violations[0].startswith("sglang/srt/utils/a.py:3:"), violations)

    def test_downwards_and_within_a_package(self):
        self.assert_clean(
            "srt/layers/linear.py",
            "from sglang.srt.environ import envs\nfrom sglang.srt.mem_cache import memory_pool\n"
            "from sglang.kernels.spec import Op\nfrom .moe import topk\nimport sglang.srt.distributed\n",
        )

    def test_sideways(self):
        self.assert_violation("kernels/spec.py", "import sglang.srt.configs.rope", "imports sideways")
        self.assert_violation("srt/sampling/a.py", "import sglang.srt.mem_cache.radix_cache", "imports sideways")
        self.assert_violation("srt/configs/a.py", "import sglang.srt.server_args", "imports sideways")
        self.assert_clean("srt/arg_groups/resolve.py", "import sglang.srt.configs.model_config")

    def test_leaves(self):
        leaf = "srt/managers/io_struct.py"
        self.assert_clean("srt/utils/a.py", "from sglang.srt.managers.io_struct import AbortReq", {leaf: ""})
        self.assert_clean("srt/utils/a.py", "from sglang.srt.managers import io_struct", {leaf: ""})
        self.assert_clean(leaf, "import msgspec\nfrom sglang.srt.sampling.sampling_params import SamplingParams")
        self.assert_violation(leaf, "import sglang.srt.mem_cache.radix_cache", "leaves use layers 0-2")
        self.assert_violation(leaf, "import zmq", "leaf module imports zmq")
        self.assert_violation("srt/managers/__init__.py", "import sglang.srt.utils.common", "every module below")

    def test_the_product_never_imports_test_code(self):
        self.assert_violation(
            "srt/entrypoints/a.py", "import sglang.test.test_utils", "test code depends on the product"
        )
        text = "import sglang.srt.managers.scheduler, aiter, pickle\nis_hip()"
        self.assert_clean("test/test_utils.py", text, {"srt/environ.py": ""})

    def test_executor_sees_the_registry_alone(self):
        name = "srt/model_executor/model_runner.py"
        self.assert_clean(name, "from sglang.srt.models.registry import resolve_model_class")
        self.assert_violation(name, "import sglang.srt.models.deepseek_v2", "only sglang.srt.models.registry")

    def test_vendor_packages_have_few_homes(self):
        for package in ("aiter", "mori", "triton.language"):
            self.assert_violation("srt/layers/linear.py", f"def f():\n    import {package}", f"imports {package}")
            self.assert_clean("kernels/ops/norm/rmsnorm.py", f"import {package}")
            self.assert_clean("srt/layers/sampler.py", f"import {package}")
        self.assert_violation("srt/layers/linear.py", "from torch import distributed", "imports torch.distributed")
        self.assert_violation("srt/managers/a.py", "from starlette.routing import Route", "imports starlette")
        self.assert_violation("kernels/a.py", "import transformers", "nowhere in the product")
        self.assert_violation("srt/managers/a.py", "import pickle", "nowhere in the product")

    def test_platform_questions(self):
        for text in ("if is_hip():\n    pass", "x = torch.version.hip", "from a import b\nb.is_hip()"):
            with self.subTest(text):
                self.assert_violation("srt/layers/linear.py", text, "ask current_platform")
                self.assert_clean("srt/platforms/rocm.py", text)
                self.assert_clean("srt/models/qwen3_5.py", text)

    def test_data_and_lowest_layer_use_the_standard_library(self):
        self.assert_violation("srt/environ.py", "import torch", "standard library alone")
        self.assert_violation("embedded_models/__init__.py", "import numpy", "standard library alone")
        self.assert_violation("embedded_models/__init__.py", "import sglang.srt.environ", "it is data alone")
        self.assert_clean("srt/configs/a.py", "import sglang.embedded_models")

    def test_a_module_without_a_row_is_an_error(self):
        self.assert_violation("srt/quantization/fp8.py", "", "has no layer")
        self.assert_violation("srt/managers/a.py", "import sglang.srt.quantization.fp8", "has no layer")

    def test_circles_of_files(self):
        one, two, three = (f"srt/utils/{name}.py" for name in ("one", "two", "three"))
        back = "from sglang.srt.utils.one import x"
        for text in (
            back,
            "def f():\n    from sglang.srt.utils import one",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .one import x",
        ):
            with self.subTest(text):
                status, violations = self.check({one: "import sglang.srt.utils.two", two: text})
                self.assertEqual((status, len(violations)), (1, 1), violations)
                names = ("sglang.srt.utils.one", "sglang.srt.utils.two", "sglang.srt.utils.one")
                self.assertIn(f"files import each other: {' -> '.join(names)}", violations[0])
        ring = {one: "import sglang.srt.utils.two", two: "import sglang.srt.utils.three", three: back}
        self.assertEqual(len(self.check(ring)[1]), 1)
        both = {**ring, two: "import sglang.srt.utils.three\nimport sglang.srt.utils.one"}
        self.assertEqual(len(self.check(both)[1]), 2)
        straight = {**ring, one: "import sglang.srt.utils.two\nimport sglang.srt.utils.three", three: ""}
        self.assertEqual(self.check(straight), (0, []))
        harness = {
            "test/one.py": "import sglang.test.two",
            "test/two.py": "import sglang.test.one",
            "srt/utils/a.py": "",
        }
        self.assertEqual(len(self.check(harness)[1]), 1, "the harness of tests has no circle either")

    def test_a_violation_is_printed_and_is_the_exit_status(self):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "sglang/kernels/a.py")
            path.parent.mkdir(parents=True)
            path.write_text("import pickle")
            done = subprocess.run([sys.executable, str(SCRIPT), folder], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr, len(done.stdout.splitlines())), (1, "", 2))
        self.assertTrue(done.stdout.startswith("sglang/kernels/a.py:1: imports pickle"), done.stdout)

    def test_an_empty_tree_is_not_clean(self):
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([sys.executable, str(SCRIPT), folder], capture_output=True, text=True)
        self.assertEqual(done.returncode, 2)

    def test_this_tree(self):
        done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
        self.assertEqual(done.returncode, 0, done.stdout)


if __name__ == "__main__":
    unittest.main()

"""The contract check is green on the tree and red on each planted drift."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_ranks import FAKES, use_fakes
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

REPO = Path(__file__).resolve().parents[3]
SCRIPT = REPO / "scripts" / "check_vendor_contracts.py"


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


class TestContracts(CustomTestCase):
    def setUp(self) -> None:
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def test_the_tree_holds(self) -> None:
        result = check()
        self.assertEqual(result.returncode, 0, result.stderr)
        calls = int(result.stdout.split(" calls")[0].rsplit(" ", 1)[1])
        self.assertGreaterEqual(calls, 10, "the finder lost sight of the product's vendor calls")

    def test_drifts_of_a_fake(self) -> None:
        plants = {
            (
                "aiter/ops/sample.py",
                "out: torch.Tensor, input:",
                "out: torch.Tensor, logits:",
            ): "greedy_sample(out, logits)",
            ("aiter/fused_moe.py", "    hidden_pad: int = 0,\n", ""): "fused_moe(",
            ("aiter/fused_moe.py", "doweight_stage1: bool = False", "doweight_stage1: bool = True"): "fused_moe(",
            ("aiter/ops/enum.py", "Gelu = 1", "Gelu = 3"): "ActivationType",
            ("aiter/ops/shuffle.py", "def shuffle_weight", "def shuffle"): "shuffle_weight is missing",
            ("aiter/utility/fp4_utils.py", "def e8m0_shuffle", "def shuffle_scales"): "e8m0_shuffle is missing",
            ("aiter/ops/mhc.py", "    force_fused: bool = False,\n", ""): "mhc_fused_post_pre(",
            ("aiter/ops/triton/fusions/mhc.py", "hc_post_mult_value: float = 2.0", "hc_post_mult_value: float = 1.0"): (
                "mhc_post_pre("
            ),
            ("aiter/ops/triton/utils/mhc_config_utils.py", "M: int, C: int", "C: int, M: int"): "get_mhc_config(",
            ("mori/ops/config.py", "gpu_per_node: int = 8", "gpu_per_node: int = 4"): "EpDispatchCombineConfig(",
            ("mori/ops/config.py", "    AsyncLL = 4\n", ""): "EpDispatchCombineKernelType",
            (
                "mori/ops/dispatch_combine.py",
                "def reset(",
                "def restart(",
            ): "the vendor has no EpDispatchCombineOp.restart",
        }
        nothing = self.folder / "nothing"
        nothing.mkdir()
        for number, ((name, old, new), message) in enumerate(plants.items()):
            copy = self.folder / str(number)
            shutil.copytree(FAKES, copy)
            text = (copy / name).read_text()
            self.assertEqual(text.count(old), 1, name)
            (copy / name).write_text(text.replace(old, new))
            result = check("--fakes", copy, "--product", nothing)
            self.assertEqual(result.returncode, 1, name)
            self.assertIn(message, result.stderr)

    def test_drifts_of_a_call(self) -> None:
        aiter = "from aiter import greedy_sample as kernel\n"
        mori = "from mori.ops import EpDispatchCombineOp\nclass D:\n    def __init__(self, c):\n        "
        made = "import mori.ops\nmade = mori.ops.EpDispatchCombineOp\ndef make(c):\n    op = made(c)\n    return op\n"
        plants = {
            made + "x.y = make(1)\nx.y.dispatch_recv(wait=1)": "there is no parameter 'wait'",
            aiter + "kernel(a, b, c)": "3 positional arguments",
            aiter + "kernel(out=a, logits=b)": "there is no parameter 'logits'",
            aiter + "kernel(a)": "input is not given",
            "from aiter.ops.mhc import mhc_fused_post_pre as f\nf(a, b, c, d)": "fn, hc_scale, hc_base is not given",
            "from aiter.ops.triton.fusions.mhc import mhc_post_pre as f\nf(a, fn=b)": "there is no parameter 'fn'",
            "def f():\n    from aiter import random_sample": "random_sample is not in the contract",
            "import mori.shmem\nmori.shmem.shmem_torch_process_group_init()": "group_name is not given",
            "import mori\nmori.shmem.shmem_malloc_all()": "there is no such function",
            mori + "self.op = EpDispatchCombineOp(c)\n    def f(self):\n        self.op.dispatch(x, w, i)": "indices",
            mori + "op = EpDispatchCombineOp(c)\n        op.combine(x, w, i, 1, 2, 3, 4, True, r)": "9 positional",
            mori + "op = EpDispatchCombineOp(c)\n        op.flush()": "there is no such function",
        }
        for number, (text, message) in enumerate(plants.items()):
            product = self.folder / f"product{number}"
            product.mkdir()
            (product / "module.py").write_text(text + "\n")
            result = check("--product", product)
            self.assertEqual(result.returncode, 1, text)
            self.assertIn("module.py:", result.stderr)
            self.assertIn(message, result.stderr)

    def test_older_config_is_the_published_one(self) -> None:
        use_fakes()
        import mori.ops

        published = {
            source["name"]: source["files"]["mori/ops/dispatch_combine.py"]["names"]["EpDispatchCombineConfig"]
            for source in json.loads((FAKES / "vendor_contracts.json").read_text())["sources"]
            if source["package"] == "mori"
        }
        with mori.fake_version("1.0.0"):
            names = [field.name for field in dataclasses.fields(mori.ops.EpDispatchCombineConfig)]
        self.assertEqual(names, [entry.split("=")[0] for entry in published["amd-mori 1.0.0"]])

    def test_refresh_reads_a_checkout(self) -> None:
        """A repository of the recorded shape, in place of the vendor's."""
        repository = self.folder / "aiter"
        enums = "enum class ActivationType : int\n{\n No = -1,\n Silu, // gate\n};\nenum class QuantType : int { No };"
        files = {
            "aiter/ops/sample.py": "if True:\n    pass\n@compiled('m')\ndef greedy_sample(out, input, *, seed=0): ...",
            "aiter/fused_moe.py": "def fused_moe(x, *rest, dtype=None): ...",
            "aiter/ops/shuffle.py": "def shuffle_weight(x): ...",
            "aiter/utility/fp4_utils.py": "def e8m0_shuffle(scale): ...",
            "csrc/include/aiter_enum.h": enums,
        }
        for name, text in files.items():
            (repository / name).parent.mkdir(parents=True, exist_ok=True)
            (repository / name).write_text(text)
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
        for command in (("init", "-q"), ("add", "."), (*identity, "commit", "-q", "-m", "t")):
            subprocess.run(["git", "-C", str(repository), *command], check=True)
        origin = {"repository": "https://example.org/aiter", "commit": "HEAD"}
        later = ["aiter/ops/mhc.py", "aiter/ops/triton/fusions/mhc.py", "aiter/ops/triton/utils/mhc_config_utils.py"]
        source = {"name": "t", "package": "aiter", "origin": origin, "binds": [], "lacks": later, "files": {}}
        contracts = self.folder / "contracts.json"
        contracts.write_text(json.dumps({"sources": [source]}))
        result = check("--refresh", self.folder, "--contracts", contracts)
        self.assertIn("t: read", result.stdout)
        found = json.loads(contracts.read_text())["sources"][0]["files"]
        self.assertEqual(found["aiter/ops/sample.py"]["names"]["greedy_sample"], ["out", "input", "*", "seed=0"])
        self.assertEqual(found["aiter/fused_moe.py"]["names"]["fused_moe"], ["x", "*rest", "dtype=None"])
        wanted = {"ActivationType": ["No=-1", "Silu=0"], "QuantType": ["No=0"]}
        self.assertEqual(found["csrc/include/aiter_enum.h"]["names"], wanted)
        (repository / "aiter/ops/sample.py").write_text("def other(): ...")
        subprocess.run(["git", "-C", str(repository), *identity, "commit", "-qam", "t"], check=True)
        result = check("--refresh", self.folder, "--contracts", contracts)
        self.assertIn("aiter/ops/sample.py has no greedy_sample", result.stderr)


if __name__ == "__main__":
    unittest.main()

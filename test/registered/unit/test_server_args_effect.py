"""Settings without effect are logged, each once and with the reason; others are not."""

import io
import json
import tempfile
import unittest
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

from sglang import plan
from sglang.srt.arg_groups.effect import FLAGS, VARIABLES
from sglang.srt.arg_groups.parse import read
from sglang.srt.arg_groups.plan import evaluate, plan_launch
from sglang.srt.environ import envs
from sglang.srt.layers.moe.token_dispatcher.config import mori_setting_problems
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.compressed_attention_truth import CONFIG_JSON
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import TINY_CONFIGS

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

CPU = SimpleNamespace(kind="cpu", device_type="cpu", supports_graphs=False)
MI300X = SimpleNamespace(kind="hip", device_type="cuda", supports_graphs=True)
FAKES = SimpleNamespace(kind="hip", device_type="cpu", supports_graphs=True)
MODELS = {
    "dense": ("q35", "Qwen3_5ForCausalLM"),
    "qwen": ("q35moe", "Qwen3_5MoeForCausalLM"),
    "deepseek": ("dsv3", "DeepseekV3ForCausalLM"),
    "v4": ("dsv4", "DeepseekV4ForCausalLM"),
}
MORI = "--tp 2 --moe-a2a-backend mori"
# Setting, where it acts (model, platform, flags, variables next to it), where not, and why.
ROWS = (
    ("--mamba-ssm-dtype bfloat16", ("qwen",), ("deepseek",), "no recurrent states"),
    ("--swa-full-tokens-ratio 0.5", ("v4",), ("deepseek",), "has no separate pools for a sliding window"),
    ("--disable-shared-experts-fusion", ("qwen",), ("dense",), "no shared experts"),
    ("--cuda-graph-bs 1 2", ("qwen", MI300X), ("qwen", CPU), "no decode graphs"),
    ("--cuda-graph-max-bs 4", ("qwen", MI300X), ("qwen", MI300X, "--disable-cuda-graph"), "no decode graphs"),
    ("--disable-piecewise-cuda-graph", ("qwen", MI300X), ("qwen", CPU), "no decode graphs"),
    (
        "--piecewise-cuda-graph-tokens 600 700",
        ("deepseek", MI300X),
        ("deepseek", MI300X, "--chunked-prefill-size 512"),
        "at most 512 tokens",
    ),
    (
        "--piecewise-cuda-graph-max-tokens 64",
        ("qwen", MI300X),
        ("qwen", MI300X, "--disable-piecewise-cuda-graph"),
        "no prompt steps are captured",
    ),
    ("--piecewise-cuda-graph-max-tokens 32", ("deepseek", MI300X), ("deepseek", MI300X, MORI), "steps of ranks differ"),
    ("--load-balance-method round_robin", ("qwen", CPU, "--dp 2"), ("qwen",), "--dp-size is 1"),
    ("--nccl-port 9999", ("deepseek", CPU, "--tp 2"), ("deepseek",), "one rank"),
    ("--dist-timeout 60", ("deepseek", CPU, "--tp 2"), ("deepseek",), "one rank"),
    ("--deepep-mode normal", ("deepseek", CPU, "--tp 2 --moe-a2a-backend mori"), ("deepseek",), "backend is none"),
    ("SGLANG_MAMBA_SSM_DTYPE=bfloat16", ("qwen",), ("deepseek",), "no recurrent states"),
    ("SGLANG_MAMBA_SSM_DTYPE=float32", ("qwen",), ("qwen", CPU, "--mamba-ssm-dtype bfloat16"), "takes precedence"),
    ("SGLANG_MAMBA_CONV_DTYPE=float32", ("dense",), ("deepseek",), "no recurrent states"),
    ("SGLANG_TEST_RETRACT_INTERVAL=5", ("qwen", CPU, "", "SGLANG_TEST_RETRACT=1"), ("qwen",), "RETRACT is off"),
    ("SGLANG_FAKE_ROCM_ARCH=gfx950", ("qwen", FAKES), ("qwen", MI300X), "the architecture of the GPU is used"),
    ("SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK=4096", ("deepseek", CPU, MORI), ("deepseek",), "backend is none"),
    ("SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS=64", ("deepseek", CPU, MORI), ("deepseek",), "backend is none"),
    ("SGLANG_MORI_MOE_MAX_INPUT_TOKENS=64", ("deepseek", CPU, MORI), ("deepseek",), "backend is none"),
    ("SGLANG_MORI_DISPATCH_DTYPE=bf16", ("deepseek", CPU, MORI), ("deepseek",), "backend is none"),
    ("SGLANG_MORI_COMBINE_DTYPE=bf16", ("deepseek", MI300X, MORI), ("deepseek", MI300X), "backend is none"),
)
SWITCH = "SGLANG_MORI_DISPATCH_INTER_KERNEL_SWITCH_THRESHOLD"


class TestWithoutEffect(CustomTestCase):
    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        for name, (sizes, architecture) in MODELS.items():
            Path(self.folder, name).mkdir()
            sizes = CONFIG_JSON if sizes == "dsv4" else TINY_CONFIGS[sizes]
            config = {**sizes, "architectures": [architecture], "dtype": "bfloat16"}
            Path(self.folder, name, "config.json").write_text(json.dumps(config), encoding="utf-8")

    def plan(self, setting, model, platform=CPU, flags="", variables=""):
        is_variable = setting.startswith("SGLANG_")
        argv = ["--model-path", f"{self.folder}/{model}", "--load-format", "dummy", "--skip-tokenizer-init"]
        argv += flags.split() + ([] if is_variable else setting.split())
        environ = dict(entry.split("=") for entry in (variables.split() + [setting] * is_variable))
        return evaluate(read(argv), platform, environ)

    def test_each_setting_where_it_acts_and_where_it_does_not(self):
        for setting, acts, idle, reason in ROWS:
            with self.subTest(setting):
                found = self.plan(setting, *acts)
                self.assertEqual((found.errors, self.idle(found)), ([], []))
                found = self.plan(setting, *idle)
                (line,) = self.idle(found)
                self.assertEqual(found.errors, [])
                self.assertRegex(line, f"^{setting.partition('=')[0]} has no effect: .*{reason}")

    def idle(self, plan):
        return [line for line in plan.warnings if "has no effect:" in line]

    def test_a_default_is_no_setting(self):
        for model in MODELS:
            for platform in (CPU, MI300X, FAKES):
                self.assertEqual(self.idle(self.plan("--mem-fraction-static 0.5", model, platform)), [])

    def test_what_has_no_effect_is_checked_all_the_same(self):
        for setting in ("SGLANG_MAMBA_SSM_DTYPE=int8", "SGLANG_FAKE_ROCM_ARCH=gfx90a", "--cuda-graph-max-bs -1"):
            self.assertTrue(self.plan(setting, "deepseek", CPU).errors, setting)

    def test_variables_of_an_exchange_that_is_not_used_are_in_the_range_of_one_node(self):
        args = ServerArgs(tp_size=2)
        for cap, worst in ((32_768, ""), (9_999_999, "1..32768")):
            with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(cap):
                for problems in (mori_setting_problems(args), plan_launch(args).errors):
                    self.assertIn(worst, "".join(line for line in problems if "PREALLOC" in line))
                    self.assertEqual(any("PREALLOC" in line for line in problems), bool(worst))
                with self.assertRaises(SystemExit) if worst else nullcontext(), redirect_stderr(io.StringIO()) as err:
                    with redirect_stdout(io.StringIO()):
                        plan.main(["--model-path", f"{self.folder}/deepseek", "--skip-tokenizer-init"])
                self.assertIn(worst, err.getvalue())

    def test_a_switch_between_kernels_of_several_nodes(self):
        for flags, reason in (("", "--moe-a2a-backend is none"), (MORI, "all ranks are on one node")):
            found = self.plan(f"{SWITCH}=64", "deepseek", MI300X, flags)
            self.assertEqual(self.idle(found), [f"{SWITCH} has no effect: {reason}"])
        found = self.plan(f"{SWITCH}=64", "deepseek", MI300X, "--tp 16 --moe-a2a-backend mori")
        self.assertEqual(self.idle(found), [])

    def test_every_row_of_the_table_is_here(self):
        names = {row[0].split()[0].partition("=")[0] for row in ROWS} | {SWITCH}
        flags = {f"--{name.replace('_', '-')}" for name in FLAGS}
        self.assertEqual(names, flags | {variable.name for variable, _ in VARIABLES})
        self.assertLessEqual(set(FLAGS), set(vars(ServerArgs())))


if __name__ == "__main__":
    unittest.main()

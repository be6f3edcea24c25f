"""Streams before a launch: what a plan and a dry run report, and what is set in the environment of the ranks."""

import contextlib
import io
import json
import re
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from sglang import plan as cli
from sglang.srt.arg_groups.plan import plan_launch
from sglang.srt.entrypoints.launch import check_plan
from sglang.srt.environ import envs
from sglang.srt.managers import process_launch
from sglang.srt.managers.ipc import IpcNames
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import TINY_CONFIGS

use_fakes()
register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

MORI = ("--tp", "2", "--moe-a2a-backend", "mori")


class StreamPlanCase(CustomTestCase):
    def setUp(self):
        self.model = self.enterContext(tempfile.TemporaryDirectory())
        config = {**TINY_CONFIGS["dsv3"], "architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16"}
        Path(self.model, "config.json").write_text(json.dumps(config), encoding="utf-8")


class TestPlan(StreamPlanCase):
    def run_plan(self, *flags):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.main(["--model-path", self.model, "--load-format", "dummy", "--skip-tokenizer-init", *flags])
        return status, out.getvalue(), err.getvalue()

    def test_streams_are_planned_as_the_ranks_plan_them(self):
        with envs.SGLANG_ROCM_USE_MULTI_STREAM.override(True):
            status, out, err = self.run_plan(*MORI)
            self.assertEqual(status, 0)
            self.assertRegex(out, r"the launch sets: GPU_MAX_HW_QUEUES=5, MORI_SHMEM_HEAP_SIZE=\w+\n")
            self.assertRegex(out, r"overlap deepseek.shared_experts: on \(.*on gfx942\n")
            self.assertRegex(err, "warning: overlap .* pays when .* add --deepep-mode low_latency")
            self.assertNotIn("QUEUES", err)
            with mock.patch.dict("os.environ", {"GPU_MAX_HW_QUEUES": "2"}):
                _, out, err = self.run_plan(*MORI, "--json")
            self.assertRegex(err, "warning: GPU_MAX_HW_QUEUES=2 gives .* too few .* set GPU_MAX_HW_QUEUES=5")
            queues = json.loads(out)["streams"]["hardware_queues"]
            self.assertEqual((queues["needed"], queues["available"]), (5, 2))
            # Fused, nothing is left to overlap.
            _, out, err = self.run_plan("--tp", "2")
            self.assertIn("shared-expert fusion: on (default), on gfx942", out)
            self.assertRegex(err, "asks for overlap of deepseek.shared_experts, but .*--disable-shared-experts-fusion")
        with envs.SGLANG_ALT_STREAM.override(True):
            _, out, err = self.run_plan(*MORI)
        self.assertIn("SGLANG_ALT_STREAM has no effect: this model", err)
        self.assertRegex(out, "the launch sets: MORI_SHMEM")


class TestLaunch(StreamPlanCase):
    def planned(self, **flags):
        flags = {"tp_size": 2, "moe_a2a_backend": "mori", **flags}
        args = ServerArgs(model_path=self.model, load_format="dummy", skip_tokenizer_init=True, **flags)
        with override_platform(RocmOverFakesPlatform(("mori",))):
            return plan_launch(args)

    def test_queues_are_set_for_the_ranks_alone(self):
        with envs.SGLANG_ROCM_USE_MULTI_STREAM.override(True):
            plan = self.planned(attention_backend="triton")
        self.assertEqual(plan.child_variables["GPU_MAX_HW_QUEUES"], "5")
        check_plan(plan)
        # The launcher's real code, down to the environment of each process.
        real, started = process_launch.subprocess.Popen, []

        def start(command, env, **rest):
            started.append((command[2].rpartition(".")[2], env.get("GPU_MAX_HW_QUEUES")))
            return real(["true"], env=env, **rest)

        ipc = IpcNames.create(plan.args.dp_size)
        self.addCleanup(ipc.remove)
        with mock.patch.object(process_launch.subprocess, "Popen", start):
            with self.assertRaises(process_launch.LaunchError):  # nobody reports ready
                process_launch.launch_engine_processes(plan.args, ipc, plan.child_variables, plan.needed)
        self.assertEqual(started, [("scheduler_process", "5")] * 2 + [("detokenizer_process", None)])

    def test_a_dry_run_says_what_the_ranks_would(self):
        with envs.SGLANG_ROCM_USE_MULTI_STREAM.override(True):
            with mock.patch.dict("os.environ", {"GPU_MAX_HW_QUEUES": "3"}):
                lines = self.planned(dry_run=True, attention_backend="triton").lines()
            self.assertTrue([line for line in lines if line.startswith("streams: overlap deepseek.shared_experts: on")])
            self.assertTrue([line for line in lines if re.match("warning: GPU_MAX_HW_QUEUES=3 .* set .*=5", line)])
            self.assertTrue([line for line in lines if re.match("warning: overlap .*--deepep-mode low_latency", line)])
            lines = self.planned(dry_run=True, attention_backend="triton").lines()
            self.assertIn("sets: GPU_MAX_HW_QUEUES=5", lines)
            self.assertFalse([line for line in lines if "too few" in line])
            lines = self.planned(dry_run=True, moe_a2a_backend="none").lines()
            self.assertIn("streams: shared-expert fusion: on (default)", lines)
            self.assertTrue([line for line in lines if re.match("warning: .*--disable-shared-experts-fusion", line)])
            # A launch leaves it to the ranks, which know their device.
            self.assertEqual(self.planned(moe_a2a_backend="none").warnings, [])
        with envs.SGLANG_STREAM_SITES.override("deepseek=on"):
            self.assertRegex(self.planned().errors[0], "SGLANG_STREAM_SITES takes comma-separated site=on")


if __name__ == "__main__":
    unittest.main()

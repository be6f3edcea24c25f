"""The embedded DeepSeek V4 under each of its switches, on and off, with and without drafts: the same tokens."""

import unittest
from contextlib import ExitStack

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.kernels.ops.mhc.hc_post_pre_aiter import mhc_config
from sglang.srt.environ import envs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_serving import SWITCHES, difference, prompts_around, serve

use_fakes()
register_cpu_ci(est_time=150, suite="nightly-cpu", nightly=True)

FOLDER = str(EMBEDDED_MODELS["deepseek-v4-tiny"])


class TestSwitches(CustomTestCase):
    def test_each_on_and_off(self):
        torch.set_num_threads(1)
        prompts = prompts_around((2, 126, 255, 509), vocab_size=256)
        wanted, _ = serve(FOLDER, prompts, dtype="float32")
        for arch in ("gfx950", "gfx942"):
            for name, value in (*SWITCHES, ("SGLANG_USE_AITER", True)):
                for steps in (0, 3):
                    with self.subTest(arch=arch, **{name: value}, steps=steps), ExitStack() as stack:
                        stack.enter_context(override_platform(RocmOverFakesPlatform(find_fakes(), arch)))
                        stack.enter_context(fresh_decisions())
                        stack.enter_context(getattr(envs, name).override(value))
                        mhc_config.cache_clear()
                        found, _ = serve(FOLDER, prompts, steps, dtype="float32", cuda_graph_bs=[1, 4, 8])
                        self.assertEqual(difference(found, wanted, 1e-4), "")


if __name__ == "__main__":
    unittest.main()

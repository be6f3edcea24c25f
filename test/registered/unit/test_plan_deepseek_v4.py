"""Settings of DeepSeek V4: what sglang.plan says of its pools, and what is refused."""

import contextlib
import io
import json
import tempfile
import unittest
from pathlib import Path

from sglang import plan
from sglang.srt.arg_groups.parse import read
from sglang.srt.arg_groups.plan import LaunchPlan, evaluate, resolve
from sglang.srt.configs.deepseek_v4_cache import RINGS, max_step_rows
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.compressed_attention_truth import CONFIG_JSON
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

# The widest step of several rows per request that every pool of states supports with speculation.
MAX_VERIFY_ROWS = min(max_step_rows(ratio, rings[1]) for ratio, rings in RINGS.items())


class TestPools(CustomTestCase):
    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())
        Path(self.folder, "config.json").write_text(json.dumps(CONFIG_JSON))

    def rows_and_bytes(self, *more):
        said = io.StringIO()
        flags = [
            "--model-path", self.folder, "--max-total-tokens", "1024", "--gpu-memory-gb", "8", "--platform", "cpu",
        ]  # fmt: skip
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
            self.assertEqual(plan.main([*flags, *more]), 0)
        lines = {line.split()[0]: line.split()[2:] for line in said.getvalue().splitlines() if " rows x " in line}
        return {name: (int(rest[0]), int(rest[3])) for name, rest in lines.items()}

    def test_rows_and_bytes_of_pools_in_8_bits(self):
        """Rows of 16 + 2 * 8 bytes and 8 of scales, in pages of whole rows' values; keys of 16 + 4 bytes."""
        found = self.rows_and_bytes("--kv-cache-dtype", "fp8_e4m3")
        self.assertEqual(found["swa"], (6 * 256, 3 * 40))
        self.assertEqual((found["c4"], found["c4_index"]), ((5 * 64, 40), (5 * 64, 20)))
        # Two rows of 40 bytes are a page of three times 32.
        self.assertEqual((found["c128"], found["c128_state"]), ((5 * 2, 48), (6 * 128, 2 * 24 * 4)))

    def test_rows_and_bytes_of_each_pool(self):
        # 1,024 tokens and the dummy page are 5 pages, and 6 of the window with the tombstones'; three layers, heads of
        # 24, index keys of 16, in float32.
        self.assertEqual(
            self.rows_and_bytes(),
            {
                "swa": (6 * 256, 3 * 24 * 4),
                "c4": (5 * 64, 24 * 4),
                "c4_state": (6 * 8, 2 * 48 * 4),
                "c4_index": (5 * 64, 16 * 4),
                "c4_index_state": (6 * 8, 2 * 32 * 4),
                "c128": (5 * 2, 24 * 4),
                "c128_state": (6 * 128, 2 * 24 * 4),
            },
        )

    def test_another_number_of_entries_than_the_checkpoint_names_is_refused(self):
        """Recipes of upstream export it, for checkpoints of that number."""
        model = ModelConfig.from_path(self.folder)
        for value, refused in (("16", False), ("0", False), ("512", True)):
            plan = LaunchPlan(ServerArgs(), model)
            resolve(plan, CpuPlatform(), {"SGLANG_OPT_C4_SPARSE_TOPK": value})
            said = plan.errors
            self.assertEqual(any("attends to 16 entries (index_topk). Unset it" in one for one in said), refused, said)

    def test_the_states_bear_every_number_of_drafts(self):
        """Where the settings take more drafts, the rings of states must grow with them."""
        flags = ["--model-path", self.folder, "--speculative-algorithm", "NEXTN", "--speculative-num-steps"]
        for steps, taken in ((MAX_VERIFY_ROWS - 1, False), (MAX_VERIFY_ROWS, False), (8, True)):
            errors = "\n".join(str(error) for error in evaluate(read([*flags, str(steps)]), CpuPlatform()).errors)
            self.assertEqual("at most 8" not in errors, taken, errors)


if __name__ == "__main__":
    unittest.main()

"""DeepSeek V4 over small window pools, in both formats of rows: chunks, mixed steps, drafts, retractions."""

import tempfile
import unittest

import torch

from sglang.bench_utils.one_batch import StaticBatch
from sglang.bench_utils.one_batch_cli import load
from sglang.srt.server_args import ServerArgs
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp
from sglang.test.v4_window_serving import WindowCase

register_cpu_ci(est_time=200, suite="nightly-cpu", nightly=True)

# Pages of the window, what must have happened, and the settings.
MODES = (
    (8, ("given back",), {}),
    (6, ("given back", "evicted"), {"chunked_prefill_size": 512, "enable_mixed_chunk": True}),
    (5, ("given back",), {"disable_radix_cache": True, "overlap": True}),
    (5, ("given back", "evicted", "retracted"), {"chunked_prefill_size": 256, "retract": True}),
    (4, ("given back", "evicted"), {"chunked_prefill_size": -1, "schedule_policy": "lpm"}),
    (5, ("given back", "evicted"), {"steps": 1, "chunked_prefill_size": 256}),
    (4, ("given back", "evicted"), {"steps": 8, "overlap": True}),
    (7, ("given back", "evicted"), {"steps": 3, "retract": True, "abort": "second"}),
)


class TestPlainRows(WindowCase):
    def test_all_modes(self):
        for pages, events, what in MODES:
            with self.subTest(pages=pages, **what):
                self.check(pages, *events, **what)


class TestPackedRows(TestPlainRows):
    FORMATS = {"kv_cache_dtype": "fp8_e4m3"}


class TestStaticBatch(CustomTestCase):
    def test_the_tools_of_one_batch_give_windows_back_too(self):
        torch.set_num_threads(1)
        ids = torch.randint(3, 500, (900,), generator=torch.Generator().manual_seed(1)).tolist()
        found = []
        with tempfile.TemporaryDirectory() as folder:
            save_tiny_v4_mtp(folder)
            for ratio in (1.0, 4 / 16):
                args = ServerArgs(
                    model_path=folder, max_total_tokens=4096, context_length=1024, swa_full_tokens_ratio=ratio,
                    skip_tokenizer_init=True,
                )  # fmt: skip
                runner, allocator, _ = load(args, [1])
                runner.pools.poison_windows()
                allocator.window.on_return = runner.pools.fill_window_page
                batch = StaticBatch(runner, allocator, 1)
                for start in range(0, 900, 250):
                    drawn, _ = batch.extend([ids[start : start + 250]])
                for _ in range(20):
                    drawn, _ = batch.decode(drawn)
                    found.append(int(drawn[0]))
                batch.release()
                self.assertEqual(allocator.window.num_free(), allocator.window.num_pages)
        self.assertEqual(found[:20], found[20:])


if __name__ == "__main__":
    unittest.main()

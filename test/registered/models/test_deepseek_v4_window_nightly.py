"""DeepSeek V4 over small window pools, in both formats of rows: chunks, mixed steps, drafts, retractions."""

import unittest

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.v4_window_serving import WindowCase

register_cpu_ci(est_time=200, suite="nightly-cpu", nightly=True)

# Pages of the window, what must have happened, and the settings.
MODES = (
    (8, ("given back",), {}),
    (6, ("given back", "evicted"), {"chunked_prefill_size": 512, "enable_mixed_chunk": True}),
    (5, ("given back",), {"disable_radix_cache": True, "overlap": True}),
    (5, ("given back", "evicted", "retracted"), {"chunked_prefill_size": 256, "retract": True}),
    (4, ("given back", "evicted", "revived"), {"chunked_prefill_size": -1, "schedule_policy": "lpm"}),
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


if __name__ == "__main__":
    unittest.main()

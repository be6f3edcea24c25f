"""The device's plan of a step of compressed attention against a loop over tokens, and what a ring of states keeps."""

import random
import unittest
from dataclasses import fields
from types import SimpleNamespace
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.configs.cache_layout import PLAIN_TYPES, TOMBSTONE_PAGE
from sglang.srt.configs.deepseek_v4_cache import (
    PAGE_SIZE,
    RINGS,
    deepseek_v4_layout,
    max_step_rows,
)
from sglang.srt.environ import envs
from sglang.srt.layers.attention import deepseek_v4_backend_hip_radix, deepseek_v4_plan_check
from sglang.srt.layers.attention.deepseek_v4_planner import StepRows, plan_step
from sglang.test.ci.ci_register import register_amd_ci, register_cpu_ci, register_cuda_ci
from sglang.test.deepseek_v4_plan_truth import DEVICE, PlanBatch, check_plan, random_batch
from sglang.test.test_utils import CustomTestCase
from sglang.test.v4_mtp_serving import prompts_around, serve

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")
register_cuda_ci(est_time=30, suite="stage-b-test-1-gpu-small")
register_amd_ci(est_time=30, suite="stage-b-test-1-gpu-small-amd")
register_amd_ci(est_time=30, suite="stage-b-test-1-gpu-small-amd-mi35x")

# The widest step of several rows per request that every pool of states supports with speculation.
MAX_VERIFY_ROWS = min(max_step_rows(ratio, rings[1]) for ratio, rings in RINGS.items())


class TestPlan(CustomTestCase):
    def test_random_batches(self):
        rng = random.Random(1)
        for _ in range(120):
            check_plan(random_batch(rng))

    def test_edges(self):
        """Lengths around the window, both ratios and a page; each as one request, in pieces, and next to padding."""
        edges = (1, 3, 4, 5, 8, 127, 128, 129, 255, 256, 257, 260, 511, 513)
        for end in edges:
            for start in {0, end - 1, max(0, end - 2), max(0, end - 129)}:
                check_plan(PlanBatch([(start, end)], 0, 0, 1))
                check_plan(PlanBatch([(start, end), (start, end), (0, 1)], 3, 2, 1))

    def test_a_batch_of_padding_reads_and_writes_the_dummy_page_alone(self):
        plan = check_plan(PlanBatch([], 5, 2, 1))
        self.assertTrue(bool((plan.window_slots == -1).all()))
        self.assertFalse(bool(plan.store_slots.any()))
        for entries in plan.entries.values():
            self.assertFalse(bool(entries.state_rows.any() or entries.entry_rows.any() or entries.visible.any()))
            self.assertTrue(bool((entries.sources == -1).all()))

    def test_layers_of_a_window_alone_plan_no_entries(self):
        self.assertEqual(check_plan(PlanBatch([(3, 9)], 0, 0, 1), ratios=()).entries, {})


class TestCheck(CustomTestCase):
    def test_a_wrong_number_in_any_part_of_a_plan(self):
        """The check of the debug mode, which all plans of the tests above pass too."""
        with mock.patch.object(deepseek_v4_plan_check, "check_plan", wraps=deepseek_v4_plan_check.check_plan) as spy:
            check_plan(PlanBatch([(0, 300), (510, 513)], 2, 1, 1))
        plan, step, window, rings = spy.call_args.args
        parts = [(plan, name) for name in ("requests", "store_slots", "window_slots", "page_table")]
        parts += [(each, field.name) for each in plan.entries.values() for field in fields(each)]
        # A page of KV, of the window, of states and of entries, or a row further.
        for part, name in parts:
            if name == "first_positions":  # by which an entry is turned: seen by the loop alone
                continue
            tensor = getattr(part, name)
            kept = tensor.clone()
            for value in (kept + PAGE_SIZE, kept + 1, torch.full_like(kept, TOMBSTONE_PAGE * PAGE_SIZE)):
                if name == "state_rows" and torch.equal(value, kept + 1):
                    continue  # a state of the same page
                tensor.copy_(value)
                with self.subTest(name), self.assertRaises(deepseek_v4_plan_check.PlanError):
                    deepseek_v4_plan_check.check_plan(plan, step, window, rings)
            tensor.copy_(kept)
        deepseek_v4_plan_check.check_plan(plan, step, window, rings)

    def test_the_debug_mode_holds_plans_of_steps(self):
        """A plan without the last row of the window ends the step."""

        def short(*args):
            plan = plan_step(*args)
            plan.window_slots[:, -1] = -1
            return plan

        prompts = prompts_around((140,), vocab_size=256)
        folder = str(EMBEDDED_MODELS["deepseek-v4-tiny"])
        with mock.patch.object(deepseek_v4_backend_hip_radix, "plan_step", short):
            serve(folder, prompts)
            with (
                envs.SGLANG_DEBUG_POOL_CHECK.override(True),
                self.assertRaisesRegex(deepseek_v4_plan_check.PlanError, "sees its window"),
            ):
                serve(folder, prompts)


class TestRings(CustomTestCase):
    """Contents of the states of a page, found by replaying steps with every accepted length."""

    def advance(self, held, start, end, ring, ratio):
        """Write positions start..end as the plan says into ``held`` {row: position}; no row may be written twice."""
        slots = torch.arange(start, end) + PAGE_SIZE
        table = (torch.arange(1024) + PAGE_SIZE).to(torch.int32).unsqueeze(0)
        lens = torch.tensor([end])
        step = StepRows(slots, torch.zeros(1, dtype=torch.int64), lens, torch.tensor([end - start]))
        windows = torch.arange(6, dtype=torch.int32)
        plan = plan_step(step, table, windows, 1024, 1, {ratio: ring}).entries[ratio]
        for sources in plan.sources.tolist():
            for source, position in zip(sources, self.tokens(plan, sources, slots, ratio), strict=True):
                if source <= -2:
                    self.assertEqual(held.get(-2 - source), position)
        written = [row for row in plan.state_rows.tolist() if row]
        self.assertEqual(len(written), len(set(written)))
        held.update({row: start + i for i, row in enumerate(plan.state_rows.tolist()) if row})

    @staticmethod
    def tokens(plan, sources, slots, ratio):
        last = int(slots[sources[-1]]) - PAGE_SIZE if sources[-1] >= 0 else -1
        return [last + 1 - len(sources) + j for j in range(len(sources))]

    def test_every_accepted_length_finds_its_tokens(self):
        """Steps of the widest width over page and entry ends, each accepted in part, then decode past two entries."""
        for ratio, rings in RINGS.items():
            for ring, width in ((rings[0], max_step_rows(ratio, rings[0])), (rings[1], MAX_VERIFY_ROWS)):
                for start in (*range(120, 133, 1 + ratio // 64), *range(246, 260, 1 + ratio // 64), 509, 511):
                    verified = {}
                    self.advance(verified, 0, start, ring, ratio)
                    self.advance(verified, start, start + width, ring, ratio)
                    for end in range(start + 1, start + width + 1):
                        held = dict(verified)
                        self.advance(held, end, end + width, ring, ratio)
                        self.advance(held, end + 1, end + 1 + width, ring, ratio)

    def test_a_wider_step_loses_some(self):
        for ratio, ring in ((4, 8), (4, 16), (128, 128)):
            with self.assertRaises(AssertionError):
                self.wide(ratio, ring, max_step_rows(ratio, ring) + 1)
            self.wide(ratio, ring, max_step_rows(ratio, ring))

    def wide(self, ratio, ring, width):
        for start in range(384 - 9, 384):
            held = {}
            self.advance(held, 0, start, ring, ratio)
            self.advance(held, start, start + width, ring, ratio)
            self.advance(held, start + 1, 400, ring, ratio)

    def test_a_page_keeps_what_a_prefix_that_ends_with_it_needs(self):
        for ratio, rings in RINGS.items():
            for ring in rings:
                for chunk in (7, 64, 256, 300):
                    held = {}
                    for start in range(0, 600, chunk):
                        self.advance(held, start, min(600, start + chunk), ring, ratio)
                    for end in (256, 512):
                        self.advance(dict(held), end, end + 300, ring, ratio)


class TestLayout(CustomTestCase):
    def test_rows_and_bytes(self):
        layout = self.layout((0, 4, 128, 4), 512, 128, 2)
        pools = {pool.name: pool for pool in layout.pools}
        rows = {name: (pool.layer_ids, PAGE_SIZE // pool.units_per_row) for name, pool in pools.items()}
        self.assertEqual(
            rows,
            {
                "swa": ((0, 1, 2, 3), 256),
                "c4": ((1, 3), 64),
                "c4_state": ((1, 3), 16),
                "c4_index": ((1, 3), 64),
                "c4_index_state": ((1, 3), 16),
                "c128": ((2,), 2),
                "c128_state": ((2,), 256),
            },
        )
        # 8 KiB, 2 KiB and 4 KiB per row of states and layer.
        self.assertEqual([pools[f"{n}_state"].row_bytes for n in ("c4", "c4_index", "c128")], [16384, 4096, 4096])
        plain = self.layout((0, 128), 8, 4, 0)
        self.assertEqual([pool.name for pool in plain.pools], ["swa", "c128", "c128_state"])
        self.assertEqual(plain.pools[2].units_per_row, 2)

    @staticmethod
    def layout(ratios, head_dim, index_head_dim, num_draft_tokens):
        config = SimpleNamespace(
            num_hidden_layers=len(ratios), head_dim=head_dim, index_head_dim=index_head_dim, compress_ratios=ratios
        )
        return deepseek_v4_layout(config, PLAIN_TYPES, num_draft_tokens)

    def test_pages_rings_and_ratios_divide(self):
        for ratio, rings in RINGS.items():
            for ring in rings:
                self.assertEqual((PAGE_SIZE % ring, ring % ratio), (0, 0))
        self.assertEqual(MAX_VERIFY_ROWS, 10)


if __name__ == "__main__":
    print(f"on {DEVICE}")
    unittest.main()

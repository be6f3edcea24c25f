"""Fork and join of two streams, the race finder that guards it, the conflict check, and the overlap tracer."""

import json
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

from sglang.srt.arg_groups.stream_policy import SITE_RULES, StreamSettings, resolve_streams
from sglang.srt.entrypoints.metrics import _Page
from sglang.srt.environ import envs
from sglang.srt.layers.attention.deepseek_v4_backend_hip_radix import DeepseekV4HipRadixBackend, PlanInGraph
from sglang.srt.managers.scheduler_metrics import SchedulerMetrics
from sglang.srt.platforms import override_platform
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.multi_stream_utils import OverlapSite, StreamOverlap, trace_reader
from sglang.srt.utils.overlap_check import OverlapConflictError
from sglang.srt.utils.overlap_trace import MAX_PENDING, merge_rows
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.happens_before import FakeStreamPlatform
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import whole_config

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

SITE = OverlapSite("test", enabled=True)


class StreamCase(CustomTestCase):
    """Runs under a platform with fake streams."""

    def setUp(self):
        torch.set_num_threads(1)
        self.platform = FakeStreamPlatform()
        self.enterContext(override_platform(self.platform))

    def overlap(self, site=SITE):
        return StreamOverlap(self.platform.create_stream(), site)


class TestForkJoin(StreamCase):
    def streams_of(self, site, num_tokens, capturing=True):
        self.platform.capturing = capturing
        return self.overlap(site).fork_join(
            lambda: self.platform.current_stream().name, lambda: self.platform.current_stream().name, num_tokens
        )

    def test_the_side_runs_on_its_stream_and_the_main_one_where_it_was(self):
        self.assertEqual(self.streams_of(SITE, 1), ("side1", "main"))

    def test_a_site_limits_where_it_overlaps(self):
        ranged = OverlapSite("test", True, min_tokens=4, max_tokens=8)
        for site, num_tokens, capturing, overlaps in (
            (SITE, 1, False, False),
            (OverlapSite("test", True, capture_only=False), 1, False, True),
            (SITE, 0, True, False),
            (ranged, 3, True, False),
            (ranged, 4, True, True),
            (ranged, 8, True, True),
            (ranged, 9, True, False),
            (OverlapSite("test", False), 4, True, False),
        ):
            with self.subTest(site=site, num_tokens=num_tokens, capturing=capturing):
                side, main = self.streams_of(site, num_tokens, capturing)
                self.assertEqual((side != "main", main), (overlaps, "main"))

    def test_without_a_stream_the_side_runs_first(self):
        calls = []
        StreamOverlap(None, SITE).fork_join(lambda: calls.append("side"), lambda: calls.append("main"), 3)
        self.assertEqual(calls, ["side", "main"])

    def test_what_a_callable_raises_comes_after_the_join(self):
        def fail():
            raise ArithmeticError("planted")

        for side, main in ((fail, int), (int, fail)):
            overlap = self.overlap()

            def body(overlap=overlap, side=side, main=main):
                with self.assertRaisesRegex(ArithmeticError, "planted"):
                    overlap.fork_join(side, main, 1)

            report = self.platform.observe(body)
            self.assertEqual([wait.split()[0] == "main" for wait in report.waits], [False, True])
            self.assertEqual(self.platform.current_stream().name, "main")

    def test_a_fork_within_a_side_joins_inside_out(self):
        overlap, x = self.overlap(), torch.ones(3)

        def body():
            hidden = x * 2
            inner = lambda: overlap.fork_join(lambda: hidden + 1, lambda: hidden + 2, 1)  # noqa: E731
            (a, b), c = overlap.fork_join(inner, lambda: hidden + 3, 1)
            return a + b + c

        report = self.platform.observe(body)
        self.assertEqual((report.races, report.result.tolist()), ([], [12.0, 12.0, 12.0]))


class TestRaceFinder(StreamCase):
    """The finder finds the inserted races, and no others."""

    def setUp(self):
        super().setUp()
        self.alt = self.platform.create_stream()

    def races(self, body, **options):
        return [str(race) for race in self.platform.observe(body, **options).races]

    def test_each_missing_wait_of_a_fork_is_a_race(self):
        overlap = self.overlap()

        def body():
            x = torch.zeros(4) + 1
            a, b = overlap.fork_join(lambda: x * 2, lambda: x * 3, 4)
            return a + b

        self.assertEqual(self.races(body), [])
        no_fork, no_join = (self.races(body, leave_out=index)[0] for index in range(2))
        self.assertRegex(no_fork, "write by aten.add.* on main, then read by aten.mul.* on side2")
        self.assertRegex(no_join, "write by aten.mul.* on side2, then read by aten.add.* on main")

    def test_writes_through_views_in_place_and_out_are_seen(self):
        x, out = torch.zeros(4, 4), torch.zeros(4)
        for name, side, main in (
            ("in place on both sides", lambda: x[0].add_(1), lambda: x[1].mul_(2)),
            ("in place during a read", lambda: x.view(16).zero_(), lambda: x.t() + 1),
            ("out=", lambda: torch.add(x[0], 1, out=out), lambda: out.clone()),
            ("copy into a slice", lambda: x[:, 1:].copy_(torch.ones(4, 3)), lambda: x[:, 0].sum()),
            ("index_put_", lambda: x.index_put_((torch.tensor([1]),), torch.ones(4)), lambda: x[0] * 1),
        ):
            for main_first in (False, True):
                with self.subTest(name, main_first=main_first):
                    body = lambda: self.overlap().fork_join(side, main, 4)  # noqa: B023, E731
                    self.assertNotEqual(self.races(body, main_first=main_first), [])

    def test_reading_together_is_no_race(self):
        x = torch.ones(8)
        self.assertEqual(self.races(lambda: self.overlap().fork_join(lambda: x[:4] * 2, lambda: x[4:] * 2, 4)), [])

    def test_events_order_as_waits_do(self):
        def body(with_event):
            x = torch.zeros(4) + 1
            event = self.platform.main.record_event()
            late = torch.zeros(4) + 2
            if with_event:
                self.alt.wait_event(event)
            with self.platform.use_stream(self.alt):
                return x * 2, late

        self.assertEqual(self.races(lambda: body(True)), [])
        self.assertEqual(len(self.races(lambda: body(False))), 1)

    def test_an_event_orders_nothing_that_came_after_it(self):
        def body():
            event = self.platform.main.record_event()
            x = torch.zeros(4) + 1
            self.alt.wait_event(event)
            with self.platform.use_stream(self.alt):
                return x * 2

        self.assertEqual(len(self.races(body)), 1)

    def test_memory_that_main_still_reads_is_not_given_out_again(self):
        main = self.platform.main

        def body(wait):
            self.alt.wait_stream(main)
            with self.platform.use_stream(self.alt):
                first = torch.ones(4)
            main.wait_stream(self.alt)
            total = first + 1
            del first
            if wait:
                self.alt.wait_stream(main)
            with self.platform.use_stream(self.alt):
                return torch.ones(4), total

        self.assertEqual(self.races(lambda: body(True)), [])
        self.assertRegex(self.races(lambda: body(False))[0], "memory reuse on 16 bytes: read by aten.add")


class TestConflictCheck(StreamCase):
    """SGLANG_DEBUG_STREAM_OVERLAP, with streams and without."""

    def setUp(self):
        super().setUp()
        self.enterContext(envs.SGLANG_DEBUG_STREAM_OVERLAP.override(True))

    def both(self, side, main):
        for stream in (None, self.platform.create_stream()):
            yield lambda stream=stream: StreamOverlap(stream, SITE).fork_join(side, main, 1)

    def test_shared_memory_that_one_side_writes_is_refused(self):
        x, scratch = torch.zeros(6), torch.zeros(8)
        for side, main in (
            (lambda: x.add_(1), lambda: x * 2),
            (lambda: x * 2, lambda: x[3:].zero_()),
            (lambda: scratch[:4].fill_(1), lambda: scratch[4:].fill_(2)),
        ):
            for run in self.both(side, main):
                with self.assertRaisesRegex(OverlapConflictError, "overlap test: .* the same (24|32) bytes"):
                    run()

    def test_reading_together_and_writing_apart_is_allowed(self):
        x, mine, other = torch.ones(6), torch.zeros(6), torch.zeros(6)
        for run in self.both(lambda: mine.copy_(x) + 1, lambda: other.copy_(x) + 1):
            run()

    def test_a_freed_temporary_is_not_taken_for_the_other_sides(self):
        x = torch.ones(64)
        for run in self.both(lambda: [x * i for i in range(20)][-1], lambda: [x * i for i in range(20)][-1]):
            run()

    def test_collectives_on_both_sides_are_refused(self):
        with tempfile.TemporaryDirectory() as folder:
            dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{folder}/store")
            self.addCleanup(dist.destroy_process_group)
            x, y = torch.ones(2), torch.ones(2)
            for run in self.both(lambda: dist.all_reduce(x), lambda: dist.all_reduce(y)):
                with self.assertRaisesRegex(OverlapConflictError, "both sides enter a collective"):
                    run()
            for run in self.both(lambda: dist.all_reduce(x), lambda: y + 1):
                run()

    def test_off_means_no_recording(self):
        with envs.SGLANG_DEBUG_STREAM_OVERLAP.override(False):
            x = torch.zeros(6)
            StreamOverlap(None, SITE).fork_join(lambda: x.add_(1), lambda: x * 2, 1)


class _Event:
    """A timing event at a given time in milliseconds."""

    def __init__(self, at):
        self.at = at

    def elapsed_time(self, other):
        if other.at is None:
            raise RuntimeError("not recorded")
        return other.at - self.at


class TestTrace(StreamCase):
    def traced(self, *times, capturing=True, forks=1):
        """Rows after forks whose events (fork, side begin, end, main begin, end) fall on ``times`` in milliseconds."""
        self.platform.capturing = capturing
        site = OverlapSite("test", True, capture_only=False)
        with envs.SGLANG_TRACE_OVERLAP.override(True):
            overlap = self.overlap(site)
        events = [_Event(at) for at in times] * forks
        with mock.patch.object(FakeStreamPlatform, "timing_event", side_effect=events):
            for _ in range(forks):
                self.assertEqual(overlap.fork_join(lambda: 1, lambda: 2, 7), (1, 2))
        return overlap.trace

    def test_the_share_that_ran_beside_is_measured(self):
        beside, touching, within, apart = (0, 1, 3, 2, 6), (0, 0, 2, 2, 5), (0, 1, 2, 0, 9), (0, 3, 5, 0, 1)
        for times, share in ((beside, 0.5), (touching, 0.0), (within, 1.0), (apart, 0.0)):
            rows = merge_rows([self.traced(*times)])
            self.assertEqual([row["overlap_fraction"] for row in rows], [share], times)
            self.assertEqual([row["beside_share"] for row in rows], [share], "the former name of the key")
            self.assertEqual((rows[0]["site"], rows[0]["num_tokens"], rows[0]["captured"]), ("test", 7, True))
        self.assertEqual((rows[0]["side_us"], rows[0]["main_us"]), (2000.0, 1000.0))

    def test_eager_laps_are_bounded_and_graphs_count_once(self):
        eager = self.traced(0, 0, 1, 0, 1, capturing=False, forks=MAX_PENDING + 3)
        for _ in range(2):
            rows = merge_rows([eager])
            self.assertEqual([(row["num_tokens"], row["forks"]) for row in rows], [(8, MAX_PENDING)])
        captured = self.traced(0, 0, 1, 0, 1)
        self.assertEqual(merge_rows([captured, captured])[0]["forks"], 2)
        self.assertEqual(merge_rows([captured])[0]["forks"], 1)

    def test_a_graph_that_never_ran_gives_no_row(self):
        self.assertEqual(merge_rows([self.traced(0, None, None, None, None)]), [])

    def test_where_no_event_can_be_recorded_it_says_so_once(self):
        with self.assertLogs("sglang.srt.utils.overlap_trace", "WARNING") as logs:
            trace = self.traced_without_events()
        self.assertEqual((len(logs.output), merge_rows([trace])), (1, []))

    def traced_without_events(self):
        with envs.SGLANG_TRACE_OVERLAP.override(True):
            overlap = self.overlap()
        for _ in range(3):
            self.assertEqual(overlap.fork_join(lambda: 1, lambda: 2, 7), (1, 2))
        return overlap.trace

    def test_log_and_metrics_name_site_size_and_share(self):
        model = torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])
        for layer in model:
            layer.overlap = StreamOverlap(None, SITE)
        self.assertEqual(trace_reader(model)(), [])
        model[1].overlap.trace = self.traced(0, 1, 3, 2, 6)
        rows = trace_reader(model)()
        context = SimpleNamespace(served_model_name="m")
        (family,) = _Page(context, [{"streams": {"trace": rows}}])._overlap()
        (sample,) = family.samples
        wanted = {"site": "test", "num_tokens": "7", "captured": "true"}
        self.assertEqual((sample.name, sample.value), ("sglang:stream_overlap_share", 0.5))
        self.assertLessEqual(wanted.items(), sample.labels.items())
        self.assertEqual(list(_Page(context, [{}])._overlap()), [])
        with self.assertLogs("sglang.srt.managers.scheduler_metrics", "INFO") as logs:
            load = {"num_running_reqs": 1, "num_used_tokens": 1, "max_total_num_tokens": 9, "num_queue_reqs": 0}
            SchedulerMetrics(1, lambda: rows)._log_decode(load)
        self.assertIn("Overlap of test at 7 tokens (captured: True): side 2000.0 us", logs.output[1])

    def test_off_means_no_events(self):
        with mock.patch.object(FakeStreamPlatform, "timing_event") as timing_event:
            self.overlap().fork_join(lambda: 1, lambda: 2, 7)
        timing_event.assert_not_called()


class TestModelSites(StreamCase):
    """Every site of the served models: no race, and one for each wait that is left out."""

    MODELS = {
        "dsv3": ("DeepseekV3ForCausalLM", ("deepseek.shared_experts",)),
        "q35moe-ns": (
            "Qwen3_5MoeForCausalLM",
            ("qwen3_5.shared_experts", "qwen3_5.gdn_qkvz_ba", "qwen3_5.qk_norm"),
        ),
        "dsv4": ("DeepseekV4ForCausalLM", ("deepseek.shared_experts", "deepseek_v4.compression")),
    }

    def harness(self, name, sites, **overrides):
        """A model of random weights that overlaps at ``sites`` alone."""
        forced = {rule.name: rule.name in sites for rule in SITE_RULES}
        plan = resolve_streams(self.platform, StreamSettings(forced=forced), ServerArgs())
        with tempfile.TemporaryDirectory() as folder:
            config = {**whole_config(name), "architectures": [self.MODELS[name][0]], **overrides}
            Path(folder, "config.json").write_text(json.dumps(config))
            pages = {"num_slots": 1280, "page_size": 256} if name == "dsv4" else {"num_slots": 64}
            return ModelHarness(folder, max_requests=4, load_format="dummy", streams=plan, **pages)

    def steps(self, harness):
        """Log-probabilities of a prompt and of two tokens after it."""
        harness.reset()
        request = harness.new_request()
        out = harness.extend([(request, [5, 7, 11])])
        for token in (3, 2):
            out += harness.decode([(request, token)])
        return torch.cat(out)

    def test_every_rule_has_a_model_here(self):
        tested = {site for _, sites in self.MODELS.values() for site in sites}
        self.assertEqual({rule.name for rule in SITE_RULES}, tested)

    def test_configs_name_the_sites_that_models_have(self):
        for name in self.MODELS:
            harness = self.harness(name, ())
            modules = [module for module in harness.model.modules() if hasattr(module, "overlap")]
            sites = {module.overlap.site.name for module in modules}
            self.assertEqual(set(harness.config.text.overlap_sites), sites)

    def test_overlap_changes_no_bit_in_either_order_and_has_no_race(self):
        for name, (_, sites) in self.MODELS.items():
            serial = self.steps(self.harness(name, ()))
            harness = self.harness(name, sites)
            for main_first in (False, True):
                report = self.platform.observe(lambda: self.steps(harness), main_first=main_first)  # noqa: B023
                self.assertEqual([str(race) for race in report.races], [])
                self.assertGreater(len(report.waits), 0)
                self.assertTrue(torch.equal(report.result, serial), name)

    def test_every_wait_is_needed(self):
        for name, (_, sites) in self.MODELS.items():
            for site in sites:
                harness = self.harness(name, (site,))
                # One row alone is multiplied by its norm.
                requests = [harness.new_request() for _ in range(1 if name == "dsv4" else 2)]
                harness.extend([(request, [5, 7]) for request in requests])
                step = lambda: harness.decode([(request, 3) for request in requests])  # noqa: B023, E731
                waits = self.platform.observe(step).waits
                self.assertGreater(len(waits), 1)
                for index, wait in enumerate(waits):
                    with self.subTest(site=site, left_out=f"{index}: {wait}"):
                        self.assertNotEqual(self.platform.observe(step, leave_out=index).races, [])

    def test_a_plan_made_within_a_captured_step_is_complete_before_streams_part(self):
        """In a model whose first layer compresses; without the call the side would plan, and the main stream read."""
        compressing = ["compressed_sparse_attention"] * len(whole_config("dsv4")["layer_types"])
        harness = self.harness("dsv4", self.MODELS["dsv4"][1], layer_types=compressing)
        request = harness.new_request()
        harness.extend([(request, [5, 7, 11])])
        kind = DeepseekV4HipRadixBackend
        step = lambda: harness.decode([(request, 3)])  # noqa: E731
        with mock.patch.object(kind, "plan_decode", lambda self, forward_batch: PlanInGraph()):
            self.assertEqual(self.platform.observe(step).races, [])
            with mock.patch.object(kind, "complete_plan", lambda self, forward_batch: None):
                self.assertNotEqual(self.platform.observe(step).races, [])

    def test_experts_that_wrote_in_place_would_be_found(self):
        harness = self.harness("dsv3", self.MODELS["dsv3"][1])
        experts = harness.model.model.layers[1].mlp.experts
        whole = type(experts).forward
        planted = lambda self, x, *rest: x.copy_(whole(self, x, *rest))  # noqa: E731
        with mock.patch.object(type(experts), "forward", planted):
            for main_first in (False, True):
                races = self.platform.observe(lambda: self.steps(harness), main_first=main_first).races
                self.assertIn("aten.copy_", str(races[0]))
        with envs.SGLANG_DEBUG_STREAM_OVERLAP.override(True):
            checked = self.harness("dsv3", ())
            self.steps(checked)
            with mock.patch.object(type(experts), "forward", planted), self.assertRaises(OverlapConflictError):
                self.steps(checked)


if __name__ == "__main__":
    unittest.main()

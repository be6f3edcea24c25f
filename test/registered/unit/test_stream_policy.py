"""Which sites overlap, why, and what is logged at launch, for every platform and variable."""

import itertools
import os
import random
import unittest
from dataclasses import dataclass
from unittest import mock

from sglang.srt.arg_groups.stream_policy import (
    NO_OVERLAP,
    NOT_REQUESTED,
    SITE_RULES,
    FusionChoice,
    StreamSettings,
    parse_sites,
    plan_streams,
    resolve_streams,
    stream_variables,
)
from sglang.srt.environ import EnvError, declared_variables
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.utils.multi_stream_utils import FUSED, OVERLAP, SERIAL, OverlapSite
from sglang.srt.utils.shared_modes import ModeTimes, choose_modes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.happens_before import FakeStreamPlatform
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")

DEEPSEEK, QWEN = "deepseek.shared_experts", "qwen3_5.shared_experts"
GDN, NORM = "qwen3_5.gdn_qkvz_ba", "qwen3_5.qk_norm"
V4 = "deepseek_v4.compression"
SWITCHES = (
    "SGLANG_ROCM_USE_MULTI_STREAM",
    "SGLANG_ALT_STREAM",
    "SGLANG_GDN_QKVZ_BA_ALT_STREAM",
    "SGLANG_QK_NORM_ALT_STREAM",
)


class HipPlatform(FakeStreamPlatform):
    """ROCm's policy over fake streams."""

    queue_variable = ("GPU_MAX_HW_QUEUES", 4)

    def __init__(self):
        super().__init__("hip")


@dataclass(frozen=True)
class Args:
    tp_size: int = 1
    ep_size: int = 1
    attn_dp_size: int = 1
    disable_cuda_graph: bool = False
    moe_a2a_backend: str = "none"
    deepep_mode: str = "auto"
    disable_shared_experts_fusion: bool = True
    enforce_shared_experts_fusion: bool = False


def plan(
    platform, environ=(), backend="none", mode="auto", fusion=False, enforced=False, measured=None, names=None, **sizes
):
    settings = StreamSettings.from_env(platform, dict(environ))
    args = Args(moe_a2a_backend=backend, deepep_mode=mode, **sizes)
    fusion = FusionChoice(fusion, "asked", enforced)
    return resolve_streams(platform, settings, args, fusion, measured or {}, names)


def times(**rows):
    """Times of a fictitious device: t8=(fused, overlap, serial) in ms, spread 2 %."""
    by_mode = {int(key[1:]): (dict(zip((FUSED, OVERLAP, SERIAL), ms)), 0.02) for key, ms in rows.items()}
    return ModeTimes("a device, a date", by_mode)


def enabled(found):
    return {site.name for site in found.sites if site.enabled}


class TestSites(CustomTestCase):
    def test_hip_overlaps_what_is_asked_for_and_nothing_else(self):
        wanted = {
            (): set(),
            (0,): {DEEPSEEK, V4},
            (1,): {QWEN},
            (2,): set(),
            (3,): set(),
            (1, 2): {QWEN, GDN},
            (1, 3): {QWEN, NORM},
            (2, 3): set(),
            (0, 1, 2, 3): {DEEPSEEK, QWEN, GDN, NORM, V4},
        }
        for chosen, sites in wanted.items():
            found = plan(HipPlatform(), {SWITCHES[index]: "1" for index in chosen})
            self.assertEqual(enabled(found), sites, chosen)

    def test_no_switch_takes_from_cuda_what_overlaps_there(self):
        for values in itertools.product(("0", "1"), repeat=4):
            found = plan(FakeStreamPlatform("cuda"), zip(SWITCHES, values))
            self.assertEqual(enabled(found), {DEEPSEEK, QWEN, GDN, V4})  # NORM was measured to lose
            self.assertEqual((found.queues, found.warnings), (None, ()))

    def test_each_decision_has_its_reason(self):
        found = plan(HipPlatform(), {"SGLANG_GDN_QKVZ_BA_ALT_STREAM": "1", "SGLANG_ROCM_USE_MULTI_STREAM": "true"})
        self.assertEqual(found.site(GDN).reason, "needs SGLANG_ALT_STREAM and SGLANG_GDN_QKVZ_BA_ALT_STREAM")
        self.assertEqual(found.site(QWEN).reason, NOT_REQUESTED)
        self.assertEqual(found.site(DEEPSEEK).reason, "SGLANG_ROCM_USE_MULTI_STREAM; range not measured")
        self.assertIsNone(found.site(DEEPSEEK).max_tokens)
        # Where upstream overlaps and this does not, the plan says why.
        self.assertRegex(plan(FakeStreamPlatform("cuda")).site(NORM).reason, "upstream has it on for CUDA; on one H200")
        # What was measured on NVIDIA's GPUs binds there alone.
        cuda = plan(FakeStreamPlatform("cuda")).site(DEEPSEEK)
        self.assertRegex(cuda.reason, "^default on cuda; range measured on H200")
        self.assertEqual(cuda.max_tokens, 64)
        lines = [line.split(" (")[0] for line in found.lines()]
        states = {DEEPSEEK: "on", GDN: "off", V4: "on"}
        shown = [f"overlap {name}: {state}" for name, state in states.items()]
        self.assertEqual(lines, ["shared-expert fusion: off", *shown])
        self.assertEqual(found.describe()["sites"][GDN]["reason"], found.site(GDN).reason)

    def test_a_model_is_told_of_its_own_sites_alone(self):
        asked = dict.fromkeys(SWITCHES, "1")
        with mock.patch.dict("os.environ", {**asked, "GPU_MAX_HW_QUEUES": "8"}), override_platform(HipPlatform()):
            found = plan_streams(Args(disable_shared_experts_fusion=False), names=(DEEPSEEK,))
            self.assertEqual(list(found.describe()["sites"]), [DEEPSEEK])
            self.assertFalse([line for line in (*found.lines(), *found.warnings) if "qwen3_5" in line])
            self.assertEqual((found.site(GDN).enabled, found.side_stream(QWEN, GDN)), (False, None))
            self.assertEqual(plan_streams(Args(), names=()).sites, ())
            with mock.patch.dict("os.environ", {"SGLANG_STREAM_SITES": f"{QWEN}=on,{DEEPSEEK}=off"}):
                warnings = plan_streams(Args(), names=(DEEPSEEK,)).warnings
            self.assertIn(f"names {QWEN}, a site that this model does not have", warnings[0])
            self.assertEqual(len(plan_streams(Args()).sites), len(SITE_RULES))
        with self.assertRaises(KeyError):
            found.site("other")

    def test_a_platform_without_streams_overlaps_nothing_and_says_so(self):
        platform = HipPlatform()
        platform.supports_streams = False
        found = plan(platform, dict.fromkeys(SWITCHES, "1"))
        self.assertEqual((enabled(found), found.queues), (set(), None))
        self.assertIn("has no streams", found.site(DEEPSEEK).reason)
        self.assertEqual(enabled(plan(FakeStreamPlatform("cpu"))), set())

    def test_eager_steps_overlap_only_where_experts_are_on_other_ranks(self):
        for backend, capture_only in (("none", True), ("mori", False)):
            found = plan(FakeStreamPlatform("cuda"), backend=backend)
            self.assertEqual([found.site(name).capture_only for name in (DEEPSEEK, QWEN)], [capture_only] * 2)
            self.assertTrue(found.site(GDN).capture_only and found.site(NORM).capture_only)

    def test_a_forced_site_is_forced_either_way(self):
        forced = {"SGLANG_STREAM_SITES": f" {DEEPSEEK}=on, {QWEN}=off,"}
        self.assertEqual(enabled(plan(HipPlatform(), {**forced, "SGLANG_ALT_STREAM": "1"})), {DEEPSEEK})
        self.assertEqual(enabled(plan(FakeStreamPlatform("cuda"), forced)), {DEEPSEEK, GDN, V4})

    def test_a_variable_that_is_on_by_default_turns_its_site_off(self):
        """On either platform, whatever else asks for it; a forced site stays forced."""
        off = {"SGLANG_OPT_USE_MULTI_STREAM_OVERLAP": "0"}
        for platform, asked in ((HipPlatform(), {SWITCHES[0]: "1"}), (FakeStreamPlatform("cuda"), {})):
            self.assertTrue(plan(platform, asked).site(V4).enabled)
            found = plan(platform, {**asked, **off})
            self.assertEqual(enabled(found), enabled(plan(platform, asked)) - {V4})
            self.assertEqual(found.site(V4).reason, "SGLANG_OPT_USE_MULTI_STREAM_OVERLAP is off")
            self.assertTrue(plan(platform, {**off, "SGLANG_STREAM_SITES": f"{V4}=on"}).site(V4).enabled)

    def test_a_malformed_force_is_refused_by_name(self):
        for text in ("qwen3_5.qknorm=on", f"{NORM}=maybe", NORM):
            with self.assertRaisesRegex(EnvError, f"SGLANG_STREAM_SITES .*{DEEPSEEK}"):
                parse_sites(text)
            with mock.patch.dict("os.environ", {"SGLANG_STREAM_SITES": text}):
                with override_platform(HipPlatform()), self.assertRaisesRegex(EnvError, "STREAM_SITES"):
                    stream_variables(Args())

    def test_a_model_makes_one_stream_for_the_sites_it_has(self):
        platform = HipPlatform()
        found = plan(platform, {"SGLANG_ALT_STREAM": "1"})
        with override_platform(platform):
            self.assertIsNone(found.side_stream(DEEPSEEK))
            self.assertIsNone(NO_OVERLAP.side_stream(DEEPSEEK, QWEN))
            self.assertEqual(found.side_stream(QWEN, GDN, NORM).name, "side1")

    def test_the_variables_act_now(self):
        declared = declared_variables()
        self.assertEqual({switch.name for rule in SITE_RULES for switch in rule.switches}, set(SWITCHES))
        self.assertEqual([name for name in SWITCHES if declared[name].pending], [])


class TestModes(CustomTestCase):
    """Which steps fuse shared experts, overlap them or do neither."""

    def test_without_measurements_the_preferred_mode_serves_all(self):
        self.assertEqual(choose_modes((FUSED, OVERLAP, SERIAL), None), ((None, FUSED),))
        self.assertEqual(choose_modes((SERIAL,), times(t1=(1, 1, 9))), ((None, SERIAL),))

    def test_the_fastest_serves_each_size_and_noise_changes_nothing(self):
        everything = (FUSED, OVERLAP, SERIAL)
        for rows, modes in (
            ({"t1": (1.0, 2.0, 3.0), "t8": (2.0, 1.0, 3.0)}, ((1, FUSED), (None, OVERLAP))),
            ({"t1": (1.0, 0.99, 0.985), "t8": (1.0, 0.97, 1.0), "t16": (1.0, 0.99, 1.0)},
             ((1, FUSED), (None, OVERLAP))),
            ({"t8": (1, 2, 3), "t1": (3, 2, 1), "t16": (1, 2, 2), "t64": (1, 0, 1)},
             ((1, SERIAL), (16, FUSED), (None, OVERLAP))),
        ):  # fmt: skip
            self.assertEqual(choose_modes(everything, times(**rows)), modes)
        self.assertEqual(choose_modes((FUSED, SERIAL), times(t1=(1.0, 0.5, 0.9))), ((None, SERIAL),))

    def test_every_size_gets_a_mode_within_the_noise_of_the_best(self):
        generator = random.Random(5)
        for _ in range(200):
            rows = {f"t{1 << i}": [generator.choice((1, 1.01, 1.03, 1.1)) for _ in range(3)] for i in range(8)}
            site = OverlapSite("test", True, modes=choose_modes((FUSED, OVERLAP, SERIAL), times(**rows)))
            for tokens, (ms, spread) in times(**rows).rows.items():
                self.assertLessEqual(ms[site.mode(tokens)] * (1 - spread), min(ms.values()), (rows, tokens))

    def test_a_site_follows_its_devices_table(self):
        table = {(QWEN, "cpu"): times(t4=(1, 2, 3), t8=(2, 1, 3), t64=(3, 2, 1))}
        site = plan(FakeStreamPlatform("cuda"), fusion=True, measured=table).site(QWEN)
        sizes = (0, 1, 4, 5, 8, 9, 64, 8192)
        modes = [FUSED, FUSED, FUSED, OVERLAP, OVERLAP, SERIAL, SERIAL, SERIAL]
        self.assertEqual([site.mode(tokens) for tokens in sizes], modes)
        self.assertEqual([site.covers(tokens) for tokens in sizes], [mode == OVERLAP for mode in modes])
        self.assertTrue(site.enabled)
        self.assertRegex(site.reason, "default on cuda; .*fused up to 4 tokens, overlap up to 8 tokens, serial beyond")
        self.assertIn("measured: a device, a date", site.reason)
        # The other model, an unmeasured device, a platform where nothing may overlap, and an order.
        self.assertTrue(plan(FakeStreamPlatform("cuda"), fusion=True, measured=table).site(DEEPSEEK).fuses(9))
        unasked = plan(HipPlatform(), fusion=True, measured=table).site(QWEN)
        self.assertEqual(unasked.modes, ((8, FUSED), (None, SERIAL)))
        forced = plan(FakeStreamPlatform("cuda"), fusion=True, enforced=True, measured=table)
        self.assertTrue(forced.site(QWEN).fuses(9) and not forced.site(QWEN).enabled)
        self.assertEqual(plan(FakeStreamPlatform("cuda"), measured=table).site(QWEN).modes, ())

    def test_the_decision_and_its_reason_are_shown(self):
        shown = plan(FakeStreamPlatform("cuda"), fusion=True).describe()
        self.assertEqual(shown["shared_expert_fusion"], {"enabled": True, "reason": "asked", "enforced": False})
        self.assertEqual(shown["sites"][QWEN]["modes"], [{"max_tokens": None, "mode": FUSED}])
        self.assertRegex(shown["sites"][QWEN]["reason"], "fused at every size .not measured on ")
        for changes, refusal, enabled_, reason in (
            ({}, "", True, "default"),
            ({"disable_shared_experts_fusion": True}, "", False, "--disable-shared-experts-fusion"),
            ({"enforce_shared_experts_fusion": True}, "", True, "--enforce-shared-experts-fusion"),
            ({"disable_shared_experts_fusion": True}, "96 wide", False, "96 wide"),
        ):
            found = plan_streams(Args(**{"disable_shared_experts_fusion": False, **changes}), refusal).fusion
            self.assertEqual((found.enabled, found.reason), (enabled_, reason))

    def test_ranks_that_can_do_nothing_else_are_said_to_fuse_every_step(self):
        platform = FakeStreamPlatform("cuda")
        for sizes, must in (({}, ""), ({"tp_size": 2, "ep_size": 2}, ""), ({"attn_dp_size": 2}, ""), ({}, "a layout")):
            args = Args(disable_shared_experts_fusion=False, **sizes)
            found = plan_streams(args, must_fuse=must, platform=platform, arch="sm_90")
            for name in (DEEPSEEK, QWEN):
                site = found.site(name)
                fixed = bool(sizes or must)
                self.assertEqual(site.modes == ((None, FUSED),) and not site.enabled, fixed or name == QWEN)
                self.assertEqual(all(site.fuses(tokens) for tokens in (1, 128, 8192)), fixed or name == QWEN)
            self.assertEqual(found.fusion.enforced, fixed)
            if fixed:
                self.assertIn(must or "another part of routed than of shared", found.site(DEEPSEEK).reason)
        # What is not fused at all is not said to be, whatever the ranks hold.
        self.assertFalse(plan_streams(Args(ep_size=2, tp_size=2), platform=platform, arch="sm_90").fusion.enabled)

    def test_without_a_plan_weights_decide(self):
        self.assertTrue(NO_OVERLAP.site(QWEN).fuses(1) and NO_OVERLAP.site(DEEPSEEK).fuses(8192))
        self.assertFalse(NO_OVERLAP.site(GDN).fuses(1))


class TestWarnings(CustomTestCase):
    def warnings(self, environ=(), **options):
        return plan(HipPlatform(), {"GPU_MAX_HW_QUEUES": "8", **dict(environ)}, **options).warnings

    def test_fusion_leaves_nothing_to_overlap_and_the_conflict_names_the_way_out(self):
        asked = {"SGLANG_ALT_STREAM": "1", "SGLANG_GDN_QKVZ_BA_ALT_STREAM": "1"}
        self.assertEqual(enabled(plan(HipPlatform(), asked, fusion=True)), {GDN})
        (warning,) = self.warnings(asked, fusion=True)
        self.assertRegex(warning, "^SGLANG_ALT_STREAM .*--disable-shared-experts-fusion")
        self.assertNotIn("\n", warning)
        self.assertEqual(self.warnings(asked), ())
        # Default overlap is replaced by fusion without a message; variables of another platform request nothing.
        cuda = plan(FakeStreamPlatform("cuda"), asked, fusion=True)
        self.assertEqual((enabled(cuda), cuda.warnings), ({GDN, V4}, ()))
        (warning,) = self.warnings({"SGLANG_STREAM_SITES": f"{DEEPSEEK}=on"}, fusion=True)
        self.assertRegex(warning, f"^SGLANG_STREAM_SITES asks for overlap of {DEEPSEEK}")

    def test_mori_without_asyncll_is_told_what_to_set(self):
        asked = {"SGLANG_ROCM_USE_MULTI_STREAM": "1"}
        for mode in ("auto", "normal"):
            (warning,) = self.warnings(asked, backend="mori", mode=mode)
            self.assertRegex(warning, r"--deepep-mode low_latency \(not auto, .*MORI_ENABLE_SDMA=1")
        (warning,) = self.warnings(asked, backend="mori", mode="low_latency")
        self.assertIn("MORI_ENABLE_SDMA=1", warning)
        quiet = {**asked, "MORI_ENABLE_SDMA": "1"}
        # Copy engines mean AsyncLL, whatever the mode says.
        for mode in ("auto", "normal", "low_latency"):
            self.assertEqual(self.warnings(quiet, backend="mori", mode=mode), ())
        self.assertEqual(self.warnings(backend="mori", mode="normal"), ())
        self.assertEqual(self.warnings(asked), ())

    def test_what_changes_nothing_for_the_model_is_said(self):
        deepseek, dense, moe = (DEEPSEEK,), (GDN, NORM), (QWEN, GDN, NORM)
        multi, alt, gdn, norm = SWITCHES
        for names, asked, wanted in (
            (deepseek, (alt,), [f"{alt} has no effect: this model has none"]),
            (deepseek, (multi, gdn), [f"{gdn} has no effect: this model has none"]),
            (moe, (multi,), [f"{multi} has no effect: this model has none"]),
            (moe, (gdn,), [f"{gdn} has no effect without {alt}: set that too"]),
            (moe, (gdn, norm), [f"{gdn} has no effect without {alt}:", f"{norm} has no effect without {alt}:"]),
            (moe, (alt,), []),
            (dense, (alt,), [f"{alt} has no effect without {gdn} or {norm}: set that too"]),
            (dense, (alt, norm), []),
            (moe, SWITCHES[1:], []),
            ((), (alt, multi), [f"{multi} has no effect: this", f"{alt} has no effect: this"]),
        ):
            with self.subTest(names=names, asked=asked):
                found = self.warnings(dict.fromkeys(asked, "1"), names=names)
                self.assertEqual(len(found), len(wanted), found)
                for warning, begin in zip(found, wanted):
                    self.assertEqual(warning[: len(begin)], begin)
        # On another platform the launch check says it of all HIP variables, once.
        cuda = plan(FakeStreamPlatform("cuda"), dict.fromkeys(SWITCHES, "1"), names=deepseek)
        self.assertEqual(cuda.warnings, ())
        cpu = CpuPlatform()
        (warning,) = plan(cpu, {"SGLANG_STREAM_SITES": f"{DEEPSEEK}=on"}).warnings
        self.assertEqual(warning, "SGLANG_STREAM_SITES has no effect: platform cpu on cpu has no streams")

    def test_the_portable_transport_has_no_such_mode(self):
        self.assertEqual(plan(FakeStreamPlatform("cuda"), backend="mori").warnings, ())


class TestQueues(CustomTestCase):
    asked = {"SGLANG_ROCM_USE_MULTI_STREAM": "1"}

    # What the plan of PR 24005 counts: experts over ranks, with graphs.
    spread = {"tp_size": 8, "backend": "mori", "mode": "low_latency"}

    def test_each_stream_of_the_plan_wants_a_queue(self):
        for sizes, extra in (
            ({"disable_cuda_graph": True}, ()),
            ({}, ("graph capture",)),
            ({"tp_size": 8}, ("graph capture", "collectives")),
            ({"tp_size": 8, "ep_size": 8}, ("graph capture", "collectives")),
            (self.spread, ("graph capture", "collectives", "all-to-all")),
            ({"tp_size": 8, "attn_dp_size": 8}, ("graph capture", "collectives between attention groups")),
            ({"tp_size": 8, "attn_dp_size": 2},
             ("graph capture", "collectives", "collectives between attention groups")),
            ({**self.spread, "attn_dp_size": 8}, ("graph capture", "all-to-all")),
        ):  # fmt: skip
            queues = plan(HipPlatform(), dict.fromkeys(SWITCHES, "1"), **sizes).queues
            # All sites of a model share one side stream.
            self.assertEqual(queues.streams, ("default", *extra, "side"), sizes)
            self.assertEqual(queues.needed, 2 + len(extra))

    def test_too_few_queues_are_said(self):
        quiet = {**self.asked, "MORI_ENABLE_SDMA": "1"}
        for text, available in (("4", 4), ("1", 1), ("many", None)):
            found = plan(HipPlatform(), {**quiet, "GPU_MAX_HW_QUEUES": text}, **self.spread)
            self.assertEqual(found.queues.available, available)
            (warning,) = found.warnings
            self.assertRegex(warning, f"GPU_MAX_HW_QUEUES={text} .* set GPU_MAX_HW_QUEUES=5 .*collectives, all-to-all")
            self.assertEqual(found.child_variables(), {})
        for text in ("5", "8"):
            self.assertEqual(plan(HipPlatform(), {**quiet, "GPU_MAX_HW_QUEUES": text}, **self.spread).warnings, ())
        # One rank needs fewer than the default gives.
        self.assertEqual(plan(HipPlatform(), {**self.asked, "GPU_MAX_HW_QUEUES": "3"}).warnings, ())
        self.assertRegex(plan(HipPlatform(), {**self.asked, "GPU_MAX_HW_QUEUES": "2"}).warnings[0], "QUEUES=3 before")

    def test_the_launcher_sets_the_number_for_its_children_alone(self):
        args = Args(tp_size=8, moe_a2a_backend="mori", deepep_mode="low_latency")
        environ = {**self.asked, "MORI_ENABLE_SDMA": "1"}
        with mock.patch.dict("os.environ", environ), override_platform(HipPlatform()):
            os.environ.pop("GPU_MAX_HW_QUEUES", None)
            self.assertRegex(plan_streams(args).warnings[0], r"GPU_MAX_HW_QUEUES=4 \(its default\)")
            variables = stream_variables(args)
            self.assertEqual(variables, {"GPU_MAX_HW_QUEUES": "5"})
            self.assertEqual(plan_streams(args, variables=variables).warnings, ())
            self.assertNotIn("GPU_MAX_HW_QUEUES", os.environ)
            os.environ.update(variables)
            in_child = plan_streams(args)
            self.assertEqual((in_child.warnings, in_child.queues.available), ((), 5))
            self.assertEqual(in_child.describe()["hardware_queues"]["needed"], 5)
            self.assertEqual(stream_variables(args), {})

    def test_what_the_default_gives_is_not_set(self):
        with mock.patch.dict("os.environ", self.asked), override_platform(HipPlatform()):
            os.environ.pop("GPU_MAX_HW_QUEUES", None)
            self.assertEqual((stream_variables(Args()), stream_variables(Args(tp_size=8))), ({}, {}))
            mori = Args(tp_size=8, moe_a2a_backend="mori")
            self.assertEqual(stream_variables(mori, (QWEN, GDN)), {})  # another model's variable

    def test_nothing_is_set_where_nothing_overlaps(self):
        for platform, environ in ((HipPlatform(), {}), (FakeStreamPlatform("cuda"), self.asked)):
            found = plan(platform, environ)
            self.assertEqual((found.queues, found.child_variables()), (None, {}))
            self.assertIsNone(found.describe()["hardware_queues"])


if __name__ == "__main__":
    unittest.main()

"""The launch check: which environments a server accepts, and what it says about them."""

import itertools
import os
import unittest
from pathlib import Path
from unittest import mock

from sglang.srt import environ_names as upstream
from sglang.srt.environ import EnvBool, EnvInt, EnvStr, check_environment
from sglang.srt.environ_check import check, misspelt
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=1, suite="stage-a-test-cpu")

# Names that upstream 0.4.3 to 0.5.23 reads and this engine does not.
UPSTREAM_NAMES = Path(__file__).with_name("upstream_variables.txt")
# What AMD's images export (docker/rocm.Dockerfile of upstream).
AMD_IMAGE = {
    "SGLANG_DISABLE_CUDNN_CHECK": "1",
    "HIP_FORCE_DEV_KERNARG": "1",
    "HSA_NO_SCRATCH_RECLAIM": "1",
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",
    "SGLANG_INT4_WEIGHT": "0",
    "SGLANG_MOE_PADDING": "1",
    "SGLANG_ROCM_DISABLE_LINEARQUANT": "0",
    "SGLANG_ROCM_FUSED_DECODE_MLA": "1",
    "SGLANG_SET_CPU_AFFINITY": "1",
    "SGLANG_USE_AITER": "1",
    "SGLANG_USE_ROCM700A": "1",
    "NCCL_MIN_NCHANNELS": "112",
    "ROCM_QUICK_REDUCE_QUANTIZATION": "INT8",
    "TORCHINDUCTOR_MAX_AUTOTUNE": "1",
    "VLLM_FP8_PADDING": "1",
}
# Exports of published MI300X and MI355X recipes, and of the AMD CI.
RECIPES = {
    "ci": {"SGLANG_IS_IN_CI": "1", "SGLANG_IS_IN_CI_AMD": "1", "SGLANG_USE_AITER": "1", "GPU_ARCHS": "gfx950"},
    "r1 mi300x": {"SGLANG_USE_AITER": "1", "SGLANG_AITER_MLA_PERSIST": "1", "RCCL_MSCCL_ENABLE": "0"},
    "qwen3.5 mi355x": {
        "SGLANG_USE_AITER": "1",
        "SGLANG_USE_AITER_UNIFIED_ATTN": "1",
        "SGLANG_MAMBA_SSM_DTYPE": "bfloat16",
        "SGLANG_ENABLE_SPEC_V2": "1",
        "SGLANG_TIMEOUT_KEEP_ALIVE": "1800",
        "SGLANG_SIMULATE_ACC_LEN": "3.39",
        "SGLANG_SIMULATE_ACC_METHOD": "match-expected",
        "SGLANG_SIMULATE_ACC_TOKEN_MODE": "real-draft-token",
    },
    "v4 mi355x": {
        "SGLANG_DEFAULT_THINKING": "1",
        "SGLANG_DSV4_REASONING_EFFORT": "max",
        "SGLANG_USE_ROCM700A": "0",
        "SGLANG_HACK_FLASHMLA_BACKEND": "unified_kv_triton",
        "SGLANG_SHARED_EXPERT_TP1": "1",
        "SGLANG_DP_SHARED_EXPERT_LOCAL": "1",
        "SGLANG_DP_USE_GATHERV": "1",
        "SGLANG_DP_USE_REDUCE_SCATTER": "1",
        "SGLANG_OPT_USE_MULTI_STREAM_OVERLAP": "false",
        "SGLANG_OPT_USE_FUSED_COMPRESS_TRITON": "true",
        "SGLANG_OPT_USE_TILELANG_MHC_PRE": "false",
        "AITER_BF16_FP8_MOE_BOUND": "0",
        "GPU_MAX_HW_QUEUES": "5",
    },
    "mori": {
        "SGLANG_MORI_DISPATCH_DTYPE": "auto",
        "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "16384",
        "SGLANG_MORI_DISPATCH_INTER_KERNEL_SWITCH_THRESHOLD": "4096",
        "SGLANG_MORI_QP_PER_TRANSFER": "4",
        "SGLANG_MORI_NUM_WORKERS": "4",
        "SGLANG_MORI_FP8_COMB": "False",
        "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": "3600",
        "SGLANG_LOG_MS": "true",
        "MORI_SHMEM_MODE": "ISOLATION",
        "MORI_IO_QP_MAX_SEND_WR": "32767",
        "MORI_MOE_MAX_INPUT_TOKENS_DECODE": "2703",
    },
}


class Sample:
    """Fields outside the real registry."""

    SGLANG_SAMPLE_BOOL = EnvBool(False, doc="A boolean.")
    SGLANG_SAMPLE_INT = EnvInt(4, minimum=1, doc="An integer.")
    SGLANG_SAMPLE_STR = EnvStr("auto", choices=("auto", "bf16"), doc="A choice.")
    SGLANG_SAMPLE_SECRET = EnvStr("", secret=True, choices=("", "hunter2"), doc="A secret.")
    SGLANG_SAMPLE_HIP = EnvBool(False, platform="hip", doc="Acts on hip.")
    SGLANG_SAMPLE_PENDING = EnvBool(False, pending="time travel", doc="Waits.")


FIELDS = {name: field for name, field in vars(Sample).items() if name.startswith("SGLANG_")}


class TestLaunchCheck(CustomTestCase):
    def test_misspelt_names_stop(self):
        for name in ("SGLANG_USE_AITR", "SGLANG_USE_AITERRR", "SGL_USE_EITR", "SGLANG_use_aiter"):
            report = check_environment({name: "1"}, "cpu")
            self.assertEqual(report.errors, (f"unknown environment variable {name}; did you mean SGLANG_USE_AITER?",))
        self.assertEqual(len(check_environment({"SGLANG_USE_AITR": ""}).errors), 1, "an empty value is no excuse")

    def test_three_letters_away_is_another_name(self):
        for name in ("SGLANG_USE_AITERRRR", "SGLANG_USE_AI", "SGLANG_MUSE_EITR"):
            report = check_environment({name: "1"}, "cpu")
            self.assertEqual(report.errors, ())
            self.assertEqual(report.warnings, (f"{name} is unknown here and has no effect",))
            self.assertEqual(check_environment({name: " "}, "cpu").warnings, ())

    def test_edits_are_counted_as_a_search_finds_them(self):
        declared = {"SGLANG_ABC": FIELDS["SGLANG_SAMPLE_BOOL"]}
        letters = "ABCX"
        near, frontier = {"ABC"}, {"ABC"}
        for _ in range(2):
            frontier = {
                edited
                for text in frontier
                for at in range(len(text) + 1)
                for edited in (
                    text[:at] + text[at + 1 :],
                    *(text[:at] + letter + text[at:] for letter in letters),
                    *(text[:at] + letter + text[at + 1 :] for letter in letters),
                )
            }
            near |= frontier
        for length in range(7):
            for word in map("".join, itertools.product(letters, repeat=length)):
                meant = misspelt("SGLANG_" + word, declared)
                self.assertEqual(meant is not None, word in near, word)

    def test_names_of_upstream_start_a_server(self):
        names = UPSTREAM_NAMES.read_text(encoding="utf-8").split()
        self.assertGreater(len(names), 950)
        report = check_environment(dict.fromkeys(names, "1"), "hip")
        self.assertEqual(report.errors, ())
        (warning,) = report.warnings
        self.assertEqual(warning, f"{', '.join(sorted(names))} are unknown here and have no effect")
        self.assertEqual(check_environment(dict.fromkeys(names, ""), "hip"), check_environment({}))

    def test_all_malformed_values_are_reported_together(self):
        report = check(
            {"SGLANG_SAMPLE_INT": "0", "SGLANG_SAMPLE_STR": "int4", "SGL_SAMPLE_BOOL": "2"},
            FIELDS,
            None,
        )
        self.assertEqual(len(report.errors), 3)
        for part in ("SGLANG_SAMPLE_INT='0'", "SGLANG_SAMPLE_STR='int4'", "SGL_SAMPLE_BOOL='2'"):
            self.assertIn(part, "\n".join(report.errors))

    def test_default_is_this_process(self):
        with mock.patch.dict(os.environ, {"SGLANG_HEALTH_CHECK_TIMEOUT": "soon"}):
            self.assertIn("SGLANG_HEALTH_CHECK_TIMEOUT='soon'", check_environment().errors[0])

    def test_other_platform_is_said_once(self):
        environ = {"SGLANG_SAMPLE_HIP": "1"}
        report = check(environ, FIELDS, "cpu")
        self.assertEqual(report.errors, ())
        self.assertEqual(report.warnings, ("SGLANG_SAMPLE_HIP has no effect on cpu: only on AMD ROCm (hip)",))
        self.assertEqual(check(environ, FIELDS, "hip").warnings, ())
        self.assertEqual(check(environ, FIELDS, None).warnings, ())
        self.assertEqual(report.set_variables, environ)
        with self.assertRaisesRegex(ValueError, "rocm"):
            check(environ, FIELDS, "rocm")

    def test_pending_is_said_once(self):
        report = check({"SGLANG_SAMPLE_PENDING": "1"}, FIELDS, "cpu")
        self.assertEqual(len(report.warnings), 1)
        self.assertIn(
            "SGLANG_SAMPLE_PENDING is accepted and has no effect yet (waits for time travel)", report.warnings[0]
        )
        self.assertTrue(Sample.SGLANG_SAMPLE_PENDING.pending)
        self.assertFalse(Sample.SGLANG_SAMPLE_HIP.pending)

    def test_other_names_share_one_warning(self):
        report = check_environment({"SGLANG_SET_CPU_AFFINITY": "1", "SGL_LOG_MS": "1", "SGLANG_QQQ": "1"})
        self.assertEqual((report.errors, len(report.warnings)), ((), 1))
        for name in ("SGLANG_SET_CPU_AFFINITY", "SGL_LOG_MS", "SGLANG_QQQ"):
            self.assertIn(name, report.warnings[0])

    def test_numerics_are_refused_unless_off(self):
        for name in upstream.NUMERICS:
            value = "nonsense" if name in upstream.DEFAULTS else "1"
            report = check_environment({name: value})
            self.assertEqual(len(report.errors), 1, name)
            self.assertIn(f"{name}={value!r} would change results", report.errors[0])
            for off in ("0", "False", "", upstream.DEFAULTS.get(name, "off")):
                self.assertEqual(check_environment({name: off}).errors, (), f"{name}={off}")
        self.assertIn("SGLANG_MORI_DISPATCH_DTYPE=fp8", check_environment({"SGLANG_MORI_FP8_DISP": "1"}).errors[0])
        self.assertEqual(len(check_environment({"SGL_INT4_WEIGHT": "1"}).errors), 1)

    def test_dead_and_rejected_names_say_what_to_use(self):
        report = check_environment({"SGLANG_MOE_SHARED_EXPERT_FUSION": "0"})
        self.assertIn("use --disable-shared-experts-fusion", report.errors[0])
        report = check_environment({"SGLANG_AITER_MOE": "1"})
        self.assertEqual(report.errors, ())
        self.assertIn("use SGLANG_USE_AITER", report.warnings[0])

    def test_old_names(self):
        report = check({"SGL_SAMPLE_INT": "5"}, FIELDS, None)
        self.assertEqual(report.errors, ())
        self.assertEqual(report.warnings, ("SGL_SAMPLE_INT is an old name; set SGLANG_SAMPLE_INT instead",))
        self.assertEqual(report.set_variables, {"SGLANG_SAMPLE_INT": "5"})
        report = check({"SGL_SAMPLE_BOOL": "1", "SGLANG_SAMPLE_BOOL": "0"}, FIELDS, None)
        self.assertIn("SGL_SAMPLE_BOOL is an old name of SGLANG_SAMPLE_BOOL and is ignored", report.warnings[0])
        self.assertEqual(report.set_variables, {"SGLANG_SAMPLE_BOOL": "0"})

    def test_amd_images_and_recipes_start(self):
        for kind in ("cpu", "cuda", "hip"):
            for name, exports in RECIPES.items():
                with self.subTest(recipe=name, kind=kind):
                    report = check_environment(AMD_IMAGE | exports, kind)
                    self.assertEqual(report.errors, ())
                    self.assertLessEqual(len(report.warnings), 14, "names that share a verdict share a warning")

    def test_kubernetes_service_links_are_not_ours(self):
        links = {
            "SGLANG_PORT": "tcp://10.0.0.7:30000",
            "SGLANG_PORT_30000_TCP": "tcp://10.0.0.7:30000",
            "SGLANG_PORT_30000_TCP_ADDR": "10.0.0.7",
            "SGLANG_SERVICE_HOST": "10.0.0.7",
            "SGLANG_QWEN_SERVICE_PORT_HTTP": "30000",
        }
        self.assertEqual(check_environment(links), check_environment({}))

    def test_foreign_names_are_shown_and_never_refused(self):
        report = check_environment({"GPU_MAX_HW_QUEUES": "5", "MORI_NO_SUCH": "1", "AITER_X": "1", "HF_TOKEN": "hf_x"})
        self.assertEqual((report.errors, report.warnings), ((), ()))
        self.assertEqual(report.set_variables, {"GPU_MAX_HW_QUEUES": "5"})
        self.assertEqual([row.name for row in upstream.FOREIGN if row.name.startswith(("SGLANG_", "SGL_"))], [])

    def test_secrets_are_redacted(self):
        accepted = check({"SGLANG_SAMPLE_SECRET": "hunter2"}, FIELDS, None)
        self.assertEqual(accepted.set_variables, {"SGLANG_SAMPLE_SECRET": "<redacted>"})
        refused = check({"SGLANG_SAMPLE_SECRET": "tr0ub4dor"}, FIELDS, None)
        self.assertEqual(len(refused.errors), 1)
        self.assertNotIn("tr0ub4dor", str(refused))


if __name__ == "__main__":
    unittest.main()

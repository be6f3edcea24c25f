"""Which implementation runs: order, forcing, preference, refusals and failures on record."""

import unittest
from unittest import mock

import torch

from sglang.kernels.registry import FORMER_NAMES, REGISTRY, KernelConfigError, parse_forcing
from sglang.kernels.spec import Impl, Op
from sglang.srt.environ import envs
from sglang.srt.platforms import current_platform
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.op_cases import cases_of
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")


class TestRegistry(CustomTestCase):
    def setUp(self):
        self.enterContext(fresh_decisions())

    def declare(self, fast=lambda x: "fast", **restrictions):
        """An op of the group "planted" with a fast implementation and the reference, gone after the test."""
        op = Op("planted.op", Impl("fast", fast, **restrictions), Impl("torch", lambda x: "torch"))
        self.addCleanup(REGISTRY.ops.pop, op.name)
        return op

    def test_the_first_that_accepts_runs_and_refusals_are_counted(self):
        op = self.declare(accepts=lambda x: x > 0)
        self.assertEqual([op(1), op(-1), op(-1)], ["fast", "torch", "torch"])
        self.assertEqual(REGISTRY.records[op.name].calls_refused, {"fast": 2})
        self.assertEqual(REGISTRY.chosen(op), "fast")

    def test_no_kernel_takes_a_vector_with_gaps(self):
        """Bodies step through vectors by their elements: an expanded one of one element has nothing after it."""
        refused = set()
        for name, op in REGISTRY.ops.items():
            for impl in (impl for impl in op.impls if impl.name == "triton"):
                for case in filter(lambda case: impl.accepts(*case.args), cases_of(op)):
                    vectors = [i for i, x in enumerate(case.args) if torch.is_tensor(x) and x.ndim == 1 and len(x) > 1]
                    for index in vectors:
                        vector = case.args[index]
                        for gaps in (torch.stack((vector, vector), 1)[:, 0], vector[:1].expand(len(vector))):
                            args = (*case.args[:index], gaps, *case.args[index + 1 :])
                            self.assertFalse(impl.accepts(*args), (name, case.name, index))
                            refused.add(name)
        self.assertGreater(len(refused), 15)

    def test_static_conditions_say_why_not(self):
        for restrictions, reason in (
            ({"kinds": {"hip"}}, "not for cpu (only hip)"),
            ({"archs": ("sm_90",)}, "not for cpu (only sm_90)"),
            ({"needs_device": True}, "needs a GPU"),
            ({"enabled": lambda: False}, "switched off"),
            ({"package": "no_such_package"}, "package no_such_package does not import (ModuleNotFoundError"),
        ):
            with self.subTest(reason=reason):
                op = self.declare(**restrictions)
                self.assertEqual(op(1), "torch")
                self.assertIn(reason, REGISTRY.records[op.name].verdicts["fast"])
                self.doCleanups()
                self.setUp()

    def test_a_failure_in_warm_up_disables_and_afterwards_or_in_capture_raises(self):
        def fails(x):
            raise OSError("planted")

        op = self.declare(fails)
        with mock.patch.object(type(current_platform), "is_capturing", lambda self: True, create=True):
            with self.assertRaisesRegex(OSError, "planted"):
                op(1)
        with mock.patch.object(REGISTRY, "serving", True), self.assertRaisesRegex(OSError, "planted"):
            op(1)
        with self.assertLogs("sglang.kernels.registry", "WARNING") as logs:
            self.assertEqual([op(1), op(1)], ["torch", "torch"])
        self.assertEqual(len(logs.records), 1)
        record = REGISTRY.records[op.name]
        self.assertEqual((record.chosen, record.disabled), ("torch", {"fast": "OSError: planted"}))

    def test_preference_and_forcing(self):
        op = self.declare()
        REGISTRY.prefer({"planted"}, "torch")
        self.assertEqual(op(1), "torch")
        REGISTRY.prefer({"planted"}, None)
        self.assertEqual(op(1), "fast")
        with envs.SGLANG_KERNELS.override("planted.op=fast"), fresh_decisions():
            REGISTRY.prefer({"planted"}, "torch")
            with self.assertRaisesRegex(KernelConfigError, "planted.op=fast, but the backend flag prefers torch"):
                op(1)

    def test_a_preference_after_the_freeze_is_decided_at_once(self):
        op = self.declare()
        REGISTRY.freeze()
        REGISTRY.prefer({"planted"}, "torch")
        self.assertEqual(REGISTRY.records[op.name].chosen, "torch")
        before = op.table
        REGISTRY.prefer({"planted"}, "torch")  # nothing new: what watches the calls of an op stays in its table
        self.assertIs(op.table, before)
        with envs.SGLANG_KERNELS.override("planted.op=fast"), fresh_decisions():
            REGISTRY.freeze()
            with self.assertRaisesRegex(KernelConfigError, "planted.op=fast, but the backend flag prefers torch"):
                REGISTRY.prefer({"planted"}, "torch")

    def test_a_forced_one_that_cannot_run_or_does_not_exist_is_an_error(self):
        for text, restrictions, words in (
            ("planted.op=fast", {"kinds": {"hip"}}, "not for cpu"),
            ("planted.op=quick", {}, "fast"),
            ("planted.opp=fast", {}, "planted.op"),
        ):
            with self.subTest(text=text), envs.SGLANG_KERNELS.override(text):
                self.declare(**restrictions)
                with self.assertRaisesRegex(KernelConfigError, words):
                    REGISTRY.freeze()
                self.doCleanups()
                self.setUp()

    def test_a_forced_one_that_refuses_or_fails_is_not_replaced(self):
        def fails(x):
            raise OSError("planted")

        with envs.SGLANG_KERNELS.override("planted.op=fast"):
            op = self.declare(fails, accepts=lambda x: x.shape[0] > 1)
            with self.assertRaisesRegex(OSError, "planted"):
                op(torch.zeros(2, 3))
            with self.assertRaisesRegex(KernelConfigError, r"planted.op=fast.*torch.float32 \(1, 3\)"):
                op(torch.zeros(1, 3))

    def test_forcing_is_read_strictly(self):
        self.assertEqual(parse_forcing(" a.b = torch ,a.b=torch"), {"a.b": "torch"})
        for text in ("a.b", "=torch", "a.b=", "a.b=x,a.b=y"):
            with self.subTest(text=text), self.assertRaises(KernelConfigError):
                parse_forcing(text)

    def test_ops_answer_to_their_former_names(self):
        REGISTRY.load_all()
        for former, name in FORMER_NAMES.items():
            with self.subTest(former), envs.SGLANG_KERNELS.override(f"{former}=torch"), fresh_decisions():
                self.assertNotIn(former, REGISTRY.ops)
                REGISTRY.freeze()
                self.assertTrue(REGISTRY.records[name].forced)
        with self.assertRaisesRegex(KernelConfigError, "'attention.decode_padded' twice"):
            parse_forcing("attention.paged_decode=triton,attention.decode_padded=torch")

    def test_declarations_are_checked(self):
        with self.assertRaisesRegex(ValueError, "unrestricted"):
            Op("planted.bad", Impl("torch", len, needs_device=True))
        with self.assertRaisesRegex(ValueError, "share a name"):
            Op("planted.bad", Impl("torch", len), Impl("torch", len))
        self.declare()
        with self.assertRaisesRegex(ValueError, "twice"):
            Op("planted.op", Impl("torch", len))


if __name__ == "__main__":
    unittest.main()

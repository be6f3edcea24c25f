"""Ranks that would run different kernels are all refused, by name."""

from __future__ import annotations

import unittest

from sglang.kernels.ops.sampling.greedy import greedy_sample
from sglang.kernels.registry import REGISTRY, KernelConfigError
from sglang.srt.distributed.kernel_agreement import require_same_kernels
from sglang.srt.distributed.parallel_state import ProcessGroupHandle
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")


class Recorded(ProcessGroupHandle):
    """Two ranks, of which the other answers as set."""

    other: list[int] | None = None

    def all_gather_ints(self, values):
        return [list(values), self.other or list(values)]


class TestAgreement(CustomTestCase):
    def test_same_and_different(self) -> None:
        with fresh_decisions():
            REGISTRY.freeze()
            group = Recorded(rank=0, size=2)
            require_same_kernels(group)
            names = sorted(REGISTRY.ops)
            mine = [[i.name for i in REGISTRY.ops[n].impls].index(REGISTRY.chosen(REGISTRY.ops[n])) for n in names]
            greedy = names.index(greedy_sample.name)
            self.assertEqual(greedy_sample.impls[mine[greedy]].name, "torch")
            for answer, shown in ((0, "rank 0 torch, rank 1 aiter"), (len(greedy_sample.impls), "rank 1 none")):
                other = [answer if i == greedy else choice for i, choice in enumerate(mine)]
                object.__setattr__(group, "other", other)
                with self.assertRaisesRegex(KernelConfigError, f"sampling.greedy: .*{shown}"):
                    require_same_kernels(group)

    def test_one_rank(self) -> None:
        require_same_kernels(ProcessGroupHandle())


if __name__ == "__main__":
    unittest.main()

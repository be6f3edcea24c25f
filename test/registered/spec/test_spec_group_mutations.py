"""Each rule by which attention groups draft together is removed once, and their test must fail."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from unittest import mock

import torch

import sglang.srt.managers.dp_sync as dp_sync
import sglang.srt.managers.tp_worker as tp_worker
import sglang.srt.model_executor.forward_batch_info as forward_batch_info
import sglang.srt.speculative.draft_graphs as draft_graphs
import sglang.srt.speculative.mtp_drafter as mtp_drafter
from sglang.srt.environ import envs
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.test import process_ranks
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.group_ranks import TwoGroups, refuse_draft_extend
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.mutation import Mutation, each_noticed
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=120, suite="nightly-cpu", nightly=True)

M = Mutation
EAGER = (
    M("an idle group drafts nothing", tp_worker, "if self.speculator is not None and batch.batch_size == 0:",
      "if False:"),
    M("an idle group leaves the last draft out", mtp_drafter, "for number in range(1, self._num_steps):",
      "for number in range(1, self._num_steps - (len(rows) == 0)):"),
    M("a draft counts the rows of a verify step", mtp_drafter, "step.batch.global_num_requests",
      "step.batch.global_num_tokens"),
    M("a verify step counts its requests", dp_sync, "tokens, requests = batch.num_tokens, len(batch.reqs)",
      "tokens, requests = len(batch.reqs), len(batch.reqs)"),
)  # fmt: skip
CAPTURED = (
    M("edits of others not known", dp_sync, "not any(edits),", "True,"),
    M("chains by the group's own size", draft_graphs, "agreed = step.batch.graph_bucket",
      "agreed = graphs[0].bucket_of(step.batch_size)"),
    M("a captured step of one group", draft_graphs, "if self._num_groups > 1 else None", "if False else None"),
)  # fmt: skip
REFUSED = (
    M("an eager step has padding", forward_batch_info, "            global_num_rows_cpu=None,\n", ""),
    M("a full batch is taken as it is", forward_batch_info, "and self.global_num_rows_cpu is None:", ":"),
)


class TestMutations(CustomTestCase):
    def check(self, work: Callable[[], None], mutations: tuple[Mutation, ...]) -> None:
        with mock.patch.object(process_ranks, "TIMEOUT", timedelta(seconds=20)):
            for mutation, noticed in zip((None, *mutations), each_noticed((m, work) for m in (None, *mutations))):
                with self.subTest(guard=mutation and mutation.name):
                    self.assertEqual(noticed, mutation is not None)

    def test_eager_groups(self) -> None:
        torch.set_num_threads(1)
        two = TwoGroups.of_embedded("deepseek-v3-tiny")
        self.check(lambda: run_processes(2, partial(two.serve, moe_a2a_backend="mori")), EAGER)

    def test_captured_groups(self) -> None:
        torch.set_num_threads(1)
        two = TwoGroups.of_embedded("deepseek-v3-tiny")
        graphs = {"attention_backend": "triton", "cuda_graph_bs": [2, 4], "max_running_requests": 4}
        with override_platform(RocmOverFakesPlatform(find_fakes())), fresh_decisions():
            self.check(lambda: run_processes(2, partial(two.serve, **graphs)), CAPTURED)
            # Eager rows of the layer follow a padded step; a full and a padded batch need two rounds, their rows one.
            eager = {"prepare": refuse_draft_extend, "moe_a2a_backend": "mori", "deepep_mode": "low_latency"}
            with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(20):
                self.check(lambda: run_processes(2, partial(two.serve, **eager, **graphs)), REFUSED)


if __name__ == "__main__":
    unittest.main()

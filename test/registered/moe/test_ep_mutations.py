"""Each guard of expert parallelism is taken out in turn, and a check must notice."""

from __future__ import annotations

import unittest

import torch

import sglang.srt.layers.moe.ep_moe.gathered as gathered
import sglang.srt.layers.moe.ep_moe.layer as layer
import sglang.srt.layers.moe.token_dispatcher.base as base
import sglang.srt.layers.moe.token_dispatcher.capacity as capacity
import sglang.srt.layers.moe.token_dispatcher.moriep as moriep
import sglang.srt.layers.moe.token_dispatcher.portable as portable
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.ep_checks import CHECKS
from sglang.test.mutation import Mutation, is_noticed
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=60, suite="stage-b-test-cpu")

M = Mutation
MUTATIONS = {
    "loads": (
        M("stale rows reach experts", layer, "ids.masked_fill(stale.unsqueeze(1), -1)", "ids"),
        M("one row too few for the experts", layer, "return input_rows(bound,", "return input_rows(bound - 1,"),
        M("other slices are not zero", layer, "torch.zeros_like(x) if self._tp.size > 1", "torch.ones_like(x) if True"),
        M("the slice of another rank", layer, "slice_of(x.shape[0], self._tp.rank,", "slice_of(x.shape[0], 0,"),
        M("received weights ignored", layer, "batch.weights[:num_rows], ids", "batch.weights[:num_rows] * 0 + 1, ids"),
        M("ids stay global", layer, "self.placement.local_ids(batch.indices[:num_rows])", "batch.indices[:num_rows]"),
        M("slices overlap", capacity, "share = -(-rows // parts)", "share = rows // parts"),
        M("a row an expert", portable, "goes.t().nonzero()[:, 1]", "goes.t().nonzero()[:, 1].flip(0)"),
        M("a sum forgets a rank", portable, "total.index_add_(0, rows, values.float())", "total[rows] = values.float()"),
    ),
    "capped": (
        M("one round whatever the cap", capacity, "if all(sum(r.rows) <= capacity and max(r.rows) <= limit", "if all(1"),
        M("cap not rounded as MORI rounds", capacity, "world_size * (min(-(-cap // world_size)", "(min(-(-cap // 1)"),
        M("only the first round", layer, "for part in rounds:", "for part in rounds[:1]:"),
        M("rounds by this rank's own rows", layer, "plan_rounds(rows, sizes", "plan_rounds((x.shape[0],), sizes"),
    ),
    "manual cut": (
        M("manual value not raised", capacity, "max(bound, min(rows, manual)) if manual", "min(rows, manual) if manual"),
        M("manual value not obeyed", capacity, "max(bound, min(rows, manual)) if manual", "rows if manual"),
        M("said each time", layer, "self.gauge.count_raised() == 1", "self.gauge.count_raised()"),
    ),
    "padding": (
        M("padding travels", layer, "topk.ids.masked_fill(padding, self.placement.first)", "topk.ids"),
        M("padding goes to one rank", layer, "topk.ids.masked_fill(padding, self.placement.first)",
          "topk.ids.masked_fill(padding, 0)"),
    ),
    "new result": (M("the transport's own storage", layer, "        return out\n\n    def run_moe_core",
                     "        return self.dispatcher._out[: len(x)]\n\n    def run_moe_core"),),
    "metadata": (M("metadata believed", layer, "or groups[self._dp_rank] != num_rows", ""),),
    "gauge": (
        M("peak not kept", layer, "self.gauge.add(batch.total_recv, num_rows)", "pass"),
        M("benchmark argument ignored", layer, "if self._full_buffer:", "if False:"),
    ),
    "device": (
        M("results on stale rows added", portable, ".masked_fill_(~self._mine.unsqueeze(1), 0)", ""),
        M("rows of others kept", portable, "views[2][rows:].fill_(-1)", "pass"),
        M("capacity not asked for", portable, "sum(rows_of_ranks) > config.max_recv or", "False and"),
    ),
    "gathered": (
        M("padding is computed", gathered, "ids.new_full((share, self.top_k), -1)", "ids.new_full((share, self.top_k), 0)"),
        M("rows of another rank", gathered, "self._world.rank * share", "0 * share"),
    ),
    "contract": (
        M("limit not checked", base, "if rows > self.max_num_inp_token_per_rank:", "if False:"),
        M("a send without its recv", moriep, "if self._kernel.is_two_phase:\n            self.dispatch_recv()", "if False:\n            pass"),
    ),
}  # fmt: skip


class TestMutations(CustomTestCase):
    def test_every_missing_guard_is_noticed(self):
        torch.set_num_threads(1)
        for name, mutations in MUTATIONS.items():
            check = CHECKS[name]
            self.assertFalse(is_noticed(None, check), f"{name} fails as it is")
            for mutation in mutations:
                with self.subTest(check=name, guard=mutation.name):
                    found = is_noticed(mutation, check)
                    print(f"{name:12} {mutation.name:36} {'noticed' if found else 'NOT NOTICED'}")
                    self.assertTrue(found)


if __name__ == "__main__":
    unittest.main()

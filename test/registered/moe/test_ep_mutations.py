"""Each guard of expert parallelism is removed once, and a check must fail."""

from __future__ import annotations

import unittest

import torch

import sglang.srt.arg_groups.stream_policy as stream_policy
import sglang.srt.layers.moe.ep_moe.gathered as gathered
import sglang.srt.layers.moe.ep_moe.layer as layer
import sglang.srt.layers.moe.placement as placement
import sglang.srt.layers.moe.token_dispatcher.base as base
import sglang.srt.layers.moe.token_dispatcher.capacity as capacity
import sglang.srt.layers.moe.token_dispatcher.config as config
import sglang.srt.layers.moe.token_dispatcher.mori_plan as mori_plan
import sglang.srt.layers.moe.token_dispatcher.moriep as moriep
import sglang.srt.layers.moe.token_dispatcher.portable as portable
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.ep_checks import CHECKS
from sglang.test.mutation import Mutation, each_noticed
from sglang.test.process_ranks import use_fakes
from sglang.test.test_utils import CustomTestCase

use_fakes()
register_cpu_ci(est_time=150, suite="nightly-cpu", nightly=True)

M = Mutation
MUTATIONS = {
    "loads": (
        M("one row too few for the experts", layer, "return input_rows(bound,", "return input_rows(bound - 1,"),
        M("other slices are not zero", layer, "torch.zeros_like(x) if tp.size > 1", "torch.ones_like(x) if True"),
        M("the slice of another rank", layer, "slice_of(x.shape[0], tp.rank,", "slice_of(x.shape[0], 0,"),
        M("received weights ignored", layer, "arrived.topk_weights[:num_rows], ids",
          "arrived.topk_weights[:num_rows] * 0 + 1, ids"),
        M("ids stay global", layer, "self.placement.local_ids(arrived.topk_ids[:num_rows])",
          "arrived.topk_ids[:num_rows]"),
        M("slices overlap", capacity, "share = -(-rows // parts)", "share = rows // parts"),
        M("a row an expert", portable, "goes.t().nonzero()[:, 1]", "goes.t().nonzero()[:, 1].flip(0)"),
        M("a sum forgets a rank", portable, "total.index_add_(0, rows, values.float())", "total[rows] = values"),
    ),
    "capped": (
        M("one round whatever the cap", capacity, "if all(sum(r.rows) <= capacity and", "if all("),
        M("cap not rounded as MORI rounds", capacity, "world_size * (min(-(-cap // world_size)", "(min(-(-cap // 1)"),
        M("only the first round", layer, "for part in rounds:", "for part in rounds[:1]:"),
        M("rounds by this rank's own rows", layer, "plan_rounds(rows, sizes", "plan_rounds((x.shape[0],), sizes"),
    ),
    "manual cut": (
        M("manual value not raised", capacity, "max(bound, min(rows, manual)) if", "min(rows, manual) if"),
        M("manual value not obeyed", capacity, "max(bound, min(rows, manual)) if", "rows if"),
        M("said each time", layer, "record_raised_limit() == 1", "record_raised_limit()"),
    ),
    "padding": (
        M("padding travels", layer, "topk.ids.masked_fill(padding, self.placement.first)", "topk.ids"),
        M("padding goes to one rank", layer, "topk.ids.masked_fill(padding, self.placement.first)",
          "topk.ids.masked_fill(padding, 0)"),
    ),
    "new result": (M("the transport's own storage", layer, "        return out\n\n    def run_moe_core",
                     "        return self.dispatcher._out[: len(x)]\n\n    def run_moe_core"),),
    "metadata": (M("metadata believed", layer, "or groups[dp_rank] != num_rows", ""),),
    "recv_stats": (
        M("peak not kept", layer, "self.recv_stats.record_dispatch(total, num_rows)", "pass"),
        M("tiers ignored", layer, "capacity, self._tiers, manual", "capacity, (), manual"),
    ),
    "device": (
        M("results on stale rows added", portable, ".masked_fill_(~self._mine.unsqueeze(1), 0)", ""),
        M("rows of others kept", portable, "views[2][rows:].fill_(-1)", "pass"),
    ),
    "gathered": (
        M("rows of another rank", gathered, "world.rank * share", "0 * share"),
    ),
    "stale": (M("stale rows reach experts", layer, "ids.masked_fill(stale.unsqueeze(1), -1)", "ids"),),
    "contract": (
        M("limit not checked", base, "if rows > self.max_num_inp_token_per_rank:", "if False:"),
        M("dtype not checked", base, "x.dtype != self.data_type or", ""),
        M("gathered overflow", portable, "sum(rows_of_ranks) > config.max_recv or", ""),
        M("routed overflow", portable, "if max(needed) > config.max_recv:", "if False:"),
        M("gathered results too short", portable, "if y.shape[0] < self._most:", "if False:"),
        M("routed results too short", portable, "if y.shape[0] < self.num_rows:", "if False:"),
        M("two sends", portable, "if self._is_sent or self._back is not None:", "if False:"),
        M("a send over a combine", portable, "if self._is_sent or self._back is not None:", "if self._is_sent:"),
        M("ids of another dispatch", portable, "if indices.shape[0] != self._num_sent:", "if False:"),
        M("recv without send", portable, "and self._is_sent, ", "or True, "),
        M("stages in any order", moriep, "if self.STAGES[self._next] != stage:", "if False:"),
    ),
    "settings": (
        M("IntraNode cap of no row", mori_plan, "if kernel is INTRA_NODE and 0 < config", "if False and 0 < config"),
        M("cap ignored under IntraNode", capacity, "min(limit, cap // world_size) if cap", "limit if cap"),
        M("capped IntraNode buffer", base, "if self.rows_by_source and self.max_recv < worst:", "if False:"),
        M("ranks of a node", mori_plan, "if per_node & (per_node - 1) or world % per_node:", "if False:"),
        M("world of a wave", mori_plan, "if kernel is ASYNC_LL and world > WAVE:", "if False:"),
        M("codec of a type", mori_plan, "and dtype != torch.bfloat16:", "and False:"),
        M("a type that MORI does not carry", mori_plan, "dtype not in (torch.bfloat16, torch.float32):", "False:"),
        M("codec of a width", mori_plan, "config.combine_groups * GROUP != hidden:", "False:"),
        M("codec of a kernel", mori_plan, "and kernel not in (INTRA_NODE, ASYNC_LL)", "and False"),
        M("fp8 without weights for it", mori_plan, 'if asked == "fp8" and row_dtype is None:', "if False:"),
        M("fp4 without weights for it", mori_plan, 'if asked == "fp4":', "if False:"),
        M("a codec where there is none", mori_plan, '"none" if kernel is None else COMBINE', "COMBINE"),
        M("experts that no rank holds whole", placement, "if num_experts % state.ep_size:", "if False:"),
        M("cap out of range", config, "if not 0 <= self.max_recv_tokens <= worst:", "if False:"),
        M("fields dropped in silence", moriep, "    if refused:", "    if False:"),
        M("cap droppable", moriep, '"max_total_recv_tokens": 0', '"max_total_recv_tokens": "any"'),
        M("dropping not said", moriep, "    if missing:", "    if False:"),
    ),
    "8-bit": (
        M("scales of others", layer, "arrived.hidden_states_scale[:num_rows]",
          "arrived.hidden_states_scale[:num_rows] * 0 + 1"),
        M("fp8 not by the weights", mori_plan, 'if row_dtype is not None and asked != "bf16"', 'if asked == "fp8"'),
    ),
    "fake": (
        M("dispatch without recv", moriep, "            self._op.dispatch_recv()\n", "            pass\n"),
        M("combine without recv", moriep, "            self._op.combine_recv()\n", "            pass\n"),
        M("negative ids for padding", layer, "masked_fill(padding, self.placement.first)", "masked_fill(padding, -1)"),
        M("overflow under MORI", layer, "for part in rounds:", "for part in plan_rounds(rows, 10**6, 10**6):"),
        M("another cap than planned", moriep, "config.max_total_recv_tokens,\n", "0,\n"),
        M("IntraNode given a cap", mori_plan, "by_source, limit, cap = kernel is INTRA_NODE,",
          "by_source, limit, cap = False,"),
    ),
    "delivery": (
        M("other rows allocated", moriep, "if op.max_num_tokens_to_recv() != config.max_recv:", "if False:"),
        M("other forms delivered", moriep, "    if found != planned:", "    if False:"),
        M("batch not held to the plan", moriep, "_check_delivery(tuple(_form(each) for each in batch), self._planned)",
          "pass"),
        M("sums not held to the plan", moriep, "_check_delivery(_form(sums), self._planned_sums)", "pass"),
        M("types not held to the plan", moriep, "(tuple(tensor.shape), tensor.dtype)", "(tuple(tensor.shape), 0)"),
        M("rows not held to the plan", moriep, "(tuple(tensor.shape), tensor.dtype)", "(0, tensor.dtype)"),
    ),
    "own bound": (
        M("MORI's bound not checked", moriep, "if most > self.config.max_recv:", "if False:"),
        M("rows unknown under a cap", moriep, "worst if rows_of_ranks is None", "0 if rows_of_ranks is None"),
        M("too few results", moriep, "y.shape[0] < self._most", "False"),
        M("results of another type", moriep, "y.dtype != self.config.combine_type or y.shape[0]", "y.shape[0]"),
        M("results of another width", moriep, "or y.shape[1] != self.config.hidden_dim:", ":"),
    ),
    "releases": (
        M("ranks that differ", moriep, "if any(theirs != versions[0] for theirs in versions):", "if False:"),
        M("a kernel that a release lacks", moriep, "if not hasattr(kernel_types, kernel.name):", "if False:"),
    ),
    "callers": (
        M("ids that were not dispatched", moriep, "if combine_input.topk_ids is not self._topk.ids:", "if False:"),
        M("fields left in", moriep, "        del kwargs[name]", "        pass"),
        M("experts of another world", moriep, "if num_local_experts * group.size != num_experts:", "if False:"),
        M("one op for all instances", moriep, "@lru_cache(maxsize=4)\ndef init_mori_op", "def init_mori_op"),
    ),
    "warning": (
        M("nothing said", moriep, 'logger.warning("%s", warning)', "pass"),
        M("said by every rank", moriep, "if self.config.rank == 0 else ()", ""),
        M("said whatever is asked", stream_policy, "settings.forced.get(r.name, _asked(r, platform, settings))",
          "True"),
        M("said on any platform", stream_policy, '    if platform.kind != "hip":', "    if False:"),
    ),
}  # fmt: skip


class TestMutations(CustomTestCase):
    def test_every_missing_guard_is_noticed(self):
        torch.set_num_threads(1)
        cases = [(name, mutation) for name, found in MUTATIONS.items() for mutation in (None, *found)]
        noticed = each_noticed((mutation, CHECKS[name]) for name, mutation in cases)
        for (name, mutation), found in zip(cases, noticed, strict=True):
            with self.subTest(check=name, guard=mutation and mutation.name):
                if mutation is not None:
                    print(f"{name:12} {mutation.name:36} {'noticed' if found else 'NOT NOTICED'}")
                self.assertEqual(found, mutation is not None)


if __name__ == "__main__":
    unittest.main()

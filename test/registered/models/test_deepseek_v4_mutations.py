"""Each part of DeepSeek V4, left out or reversed, breaks parity with transformers, so the parity tests cover it."""

import contextlib
import tempfile
import unittest
from dataclasses import replace
from unittest import mock

import torch

from sglang.kernels.ops.moe.topk import Routing
from sglang.kernels.ops.rope.rotary_tail import rotary_tail_torch
from sglang.srt.layers.attention import deepseek_v4_backend_hip_radix as backend
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.models import deepseek_v4
from sglang.srt.models.deepseek_common import v4_attention, v4_compressor
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cpu_ci(est_time=60, suite="nightly-cpu", nightly=True)

LENGTH = 400
# Parity is 1e-5 and held at 1e-4; what is left out must cost more than that by far.
VISIBLE = 1e-3


@contextlib.contextmanager
def changed(owner, name, value):
    """``owner.name`` (an attribute, or the contents of a parameter) is ``value`` for a while."""
    old = getattr(owner, name)
    if isinstance(old, torch.nn.Parameter):
        saved = old.data.clone()
        old.data.copy_(value)
        yield
        old.data.copy_(saved)
    else:
        setattr(owner, name, value)
        yield
        setattr(owner, name, old)


class TestDeepseekV4Mutations(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        # An eps so large that it shows.
        hf_model = save_tiny_checkpoint("dsv4", folder, hc_eps=0.01)
        cls.prompt = torch.randint(0, 512, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()
        with torch.no_grad():
            cls.truth = hf_model(torch.tensor([cls.prompt])).logits[0].log_softmax(-1)
        cls.harness = ModelHarness(folder, page_size=256, num_slots=4096)
        cls.layers = list(cls.harness.model.model.layers)

    def difference(self):
        self.harness.reset()
        (rows,) = self.harness.extend([(self.harness.new_request(), self.prompt)])
        return (rows - self.truth).abs().max().item()

    def broken(self, *changes):
        """The difference is visible with ``changes``, and gone after them."""
        with contextlib.ExitStack() as stack:
            for change in changes:
                stack.enter_context(change)
            self.assertGreater(self.difference(), VISIBLE)

    def tearDown(self):
        self.assertLess(self.difference(), 1e-4, "the mutation is still there")

    def attention(self, ratio=None):
        return [layer.self_attn for layer in self.layers if ratio in (None, layer.self_attn.ratio)]

    def test_shared_experts_not_clamped(self):
        self.broken(*(changed(layer.mlp.shared_experts, "swiglu_limit", None) for layer in self.layers))

    def test_routed_experts_not_clamped(self):
        self.broken(*(changed(layer.mlp.experts, "swiglu_limit", None) for layer in self.layers))

    def test_output_not_turned_back(self):
        turn = v4_attention.rotary_tail
        self.broken(
            mock.patch.object(v4_attention, "rotary_tail", lambda x, *a: x if a[2:] else turn(x, *a))
        )  # fmt: skip

    def test_no_sinks(self):
        self.broken(*(changed(part, "sinks", part.sinks.data - 1e9) for part in self.attention()))

    def test_every_entry_instead_of_the_best(self):
        self.broken(mock.patch.object(self.harness.backend, "select_entries", lambda *a: None))

    def test_queries_not_normed(self):
        prepare = backend.prepare_compressed

        def not_normed(q, *args):
            prepare(q, *args)
            return rotary_tail_torch(q, *args[1:3])

        self.broken(mock.patch.object(backend, "prepare_compressed", not_normed))

    def test_streams_mixed_the_other_way(self):
        post = deepseek_v4.hc_post
        self.broken(
            mock.patch.object(deepseek_v4, "hc_post", lambda row, x, p, comb: post(row, x, p, comb.transpose(1, 2)))
        )

    def test_fewer_steps_of_balance(self):
        for count in (1, 3, 10):
            with self.subTest(steps=count):
                mixes = [mix for layer in self.layers for mix in (layer.hc_attn, layer.hc_ffn)]
                self.broken(*(changed(mix, "iterations", count) for mix in mixes))

    def test_no_eps_of_streams(self):
        pre = deepseek_v4.hc_pre

        def without(streams, fn, base, scale, rms_eps, hc_eps, iterations):
            return pre(streams, fn, base, scale, rms_eps, 0.0, iterations)

        self.broken(mock.patch.object(deepseek_v4, "hc_pre", without))
        self.broken(changed(self.harness.model.model.hc_head, "hc_eps", 0.0))

    def test_streams_enter_without_weights(self):
        pre = deepseek_v4.hc_pre

        def mean(streams, *others):
            _, post, comb = pre(streams, *others)
            return streams.mean(1), post, comb

        self.broken(mock.patch.object(deepseek_v4, "hc_pre", mean))

    def test_entries_at_the_end_of_their_window(self):
        shifted = []
        for ratio in (4, 128):
            rope = torch.nn.Module()
            table = self.attention(ratio)[0].rotary_emb.cos_sin_cache
            rope.cos_sin_cache, rope.is_neox = table.roll(1 - ratio, 0), False
            shifted += [changed(part.compressor, "rotary_emb", rope) for part in self.attention(ratio)]
        self.broken(*shifted)

    def test_entries_seen_one_token_late(self):
        """By the token after the one that closes them."""
        backend = self.harness.backend
        plan_extend = backend.plan_extend

        def late(forward_batch):
            plan = plan_extend(forward_batch)
            entries = {
                ratio: replace(entry, visible=(forward_batch.positions // ratio).to(entry.visible.dtype))
                for ratio, entry in plan.entries.items()
            }
            return replace(plan, entries=entries)

        self.broken(mock.patch.object(backend, "plan_extend", late))

    def test_halves_of_overlapping_windows_swapped(self):
        swaps = []
        for part in self.attention(4):
            compressor = part.compressor
            width, half = compressor.width, compressor.head_dim
            rows = torch.arange(2 * width).view(2, 2, half).flip(1).flatten()
            weight = compressor.wkv_gate.weight
            swaps.append(changed(compressor.wkv_gate, "weight", weight.data[rows]))
            bias = compressor.position_bias.data
            swaps.append(changed(compressor, "position_bias", bias.roll(half, 1)))
        self.broken(*swaps)

    def test_mean_instead_of_a_softmax_per_channel(self):
        for ratio in (4, 128):
            parts = self.attention(ratio)
            halves = [part.compressor.wkv_gate.weight.data.chunk(2) for part in parts]
            gates = [torch.cat((kv, torch.zeros_like(gate))) for kv, gate in halves]
            with self.subTest(ratio=ratio):
                self.broken(
                    *(changed(p.compressor.wkv_gate, "weight", gate) for p, gate in zip(parts, gates)),
                    *(changed(p.compressor, "position_bias", 0 * p.compressor.position_bias.data) for p in parts),
                )

    def test_one_base_for_all_layers(self):
        model = self.harness.model.model
        owners = [part for ratio in (4, 128) for part in self.attention(ratio)]
        owners += [part.compressor for part in owners] + [part.indexer for part in self.attention(4)]
        self.broken(*(changed(owner, "rotary_emb", model.rotary_emb) for owner in owners))

    def test_queries_of_the_index_not_turned(self):
        self.broken(mock.patch.object(v4_compressor, "rotary_tail", lambda x, *a: x))

    def test_hash_layers_by_score(self):
        config = self.harness.config.text
        topk = TopK(Routing(config.num_experts_per_tok, "sqrtsoftplus", True, scale=1.5))
        block = self.layers[0].mlp
        self.broken(mock.patch.object(block, "_route", lambda x, ids: topk(block.gate(x))))

    def test_scores_of_another_kind(self):
        chosen = [layer.mlp.topk for layer in self.layers]
        self.broken(*(changed(topk, "rule", replace(topk.rule, scoring="sigmoid")) for topk in chosen))

    def test_no_correction_bias(self):
        gates = [layer.mlp.gate for layer in self.layers[2:]]
        self.broken(*(changed(gate, "e_score_correction_bias", torch.zeros(16)) for gate in gates))

    def test_output_groups_out_of_order(self):
        self.broken(*(changed(part.wo_a, "weight", part.wo_a.weight.data.roll(32, 0)) for part in self.attention()))


if __name__ == "__main__":
    unittest.main()

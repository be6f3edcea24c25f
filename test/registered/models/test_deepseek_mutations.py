"""Each rule of DeepSeek that could be right by luck is broken once, and parity with transformers must fail."""

import tempfile
import unittest
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

import sglang.kernels.ops.attention.prepare_mla as prepare_mla
import sglang.srt.layers.moe.topk as topk_layer
from sglang.kernels.ops.moe.topk import topk_torch
from sglang.srt.configs.rope import RopeConfig
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding import RotaryEmbedding, plain_inverse_frequencies, yarn_inverse_frequencies
from sglang.srt.models.deepseek_common.attention import DeepseekV2AttentionMLA
from sglang.srt.models.deepseek_common.moe import DeepseekV2MoE
from sglang.srt.server_args import override_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.model_harness import ModelHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_checkpoints import save_tiny_checkpoint

register_cpu_ci(est_time=15, suite="stage-b-test-cpu")

RIGHT, WRONG = 1e-4, 1e-3


class Breaker(ExitStack):
    """Sets attributes and tensors of a harness, and puts them back."""

    def __init__(self, harness):
        super().__init__()
        self.harness = harness
        self.config = harness.config.text

    def set(self, owner, name, value):
        self.callback(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def fill(self, tensor, value):
        self.callback(tensor.copy_, tensor.clone())
        tensor.copy_(value)

    def modules(self, kind):
        return [module for module in self.harness.model.modules() if isinstance(module, kind)]

    def each_topk(self, **changes):
        for block in self.modules(DeepseekV2MoE):
            self.set(block.topk, "rule", replace(block.topk.rule, **changes))

    def each_scale(self, scale):
        for attention in self.modules(DeepseekV2AttentionMLA):
            self.set(attention.attn_mqa, "scaling", scale)
            self.set(attention.attn_mha, "scaling", scale)

    def frequencies(self, frequencies, magnitude=1.0):
        (rotary,) = self.modules(RotaryEmbedding)
        angles = torch.outer(torch.arange(rotary.cos_sin_cache.shape[0]).float(), frequencies)
        self.fill(rotary.cos_sin_cache, torch.cat((angles.cos(), angles.sin()), dim=-1) * magnitude)


def scale_forgotten(b):
    b.each_topk(scale=1.0)


def scale_applied_twice(b):
    b.each_topk(scale=b.config.routed_scaling_factor**2)


def group_limit_ignored(b):
    b.each_topk(n_group=1, topk_group=1)


def one_group_too_many(b):
    b.each_topk(topk_group=b.config.topk_group + 1)


def renormalisation_flipped(b):
    b.each_topk(renormalize=not b.config.norm_topk_prob)


def scoring_flipped(b):
    b.each_topk(scoring="softmax" if b.config.scoring_func == "sigmoid" else "sigmoid")


def correction_bias_ignored(b):
    for block in b.modules(DeepseekV2MoE):
        b.fill(block.gate.e_score_correction_bias.data, torch.zeros(b.config.n_routed_experts))


def biased_weights(b):
    def with_bias(logits, bias, rule, shared):
        weights, ids = original(logits, bias, replace(rule, renormalize=False, scale=1.0))
        weights = weights + bias[ids.long()]
        return weights / weights.sum(-1, keepdim=True) * rule.scale, ids

    original = topk_layer.topk
    b.set(topk_layer, "topk", with_bias)


def group_scored_by_its_best(b):
    def by_max(logits, bias, rule, shared):
        scores = logits.sigmoid()
        groups = (scores + bias).unflatten(1, (rule.n_group, -1))
        kept = groups.amax(-1).topk(rule.topk_group).indices
        dropped = torch.ones(groups.shape[:2]).scatter_(1, kept, 0.0).bool().unsqueeze(-1)
        ids = groups.masked_fill(dropped, float("-inf")).flatten(1).topk(rule.top_k).indices
        weights = scores.gather(1, ids)
        return weights / weights.sum(-1, keepdim=True) * rule.scale, ids.int()

    b.set(topk_layer, "topk", by_max)


def group_scored_by_its_sum(b):
    def by_sum(logits, bias, rule, shared):
        groups = logits.softmax(-1).unflatten(1, (rule.n_group, -1))
        kept = groups.sum(-1).topk(rule.topk_group).indices
        dropped = torch.ones(groups.shape[:2]).scatter_(1, kept, 0.0).bool().unsqueeze(-1)
        ids = groups.masked_fill(dropped, -1.0).flatten(1).topk(rule.top_k).indices
        return groups.flatten(1).gather(1, ids) * rule.scale, ids.int()

    b.set(topk_layer, "topk", by_sum)


def router_takes_the_worst(b):
    def worst(logits, bias, rule, shared):
        _, ids = topk_torch(-logits, bias, rule)
        return logits.softmax(-1).gather(1, ids.long()) * rule.scale, ids

    b.set(topk_layer, "topk", worst)


def shared_experts_dropped(b):
    for block in b.modules(DeepseekV2MoE):
        b.set(block, "shared_experts", None)


def shared_experts_scaled(b):
    routed = b.config.routed_scaling_factor
    factor = routed if routed != 1.0 else 1.0 / b.config.n_shared_experts
    for block in b.modules(DeepseekV2MoE):
        weight = block.shared_experts.down_proj.weight.data
        b.fill(weight, weight * factor)


def gate_and_up_swapped(b):
    for block in b.modules(DeepseekV2MoE):
        weight = block.experts.w13_weight.data
        b.fill(weight, torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))


def rope_pairs_by_halves(b):
    (rotary,) = b.modules(RotaryEmbedding)
    b.set(rotary, "is_neox", True)


def rope_not_applied(b):
    b.frequencies(torch.zeros(b.config.qk_rope_head_dim // 2))


def yarn_frequencies_forgotten(b):
    b.frequencies(plain_inverse_frequencies(b.config.qk_rope_head_dim, b.config.rope.theta))


def yarn_from_the_served_length(b):
    rope: RopeConfig = b.config.rope
    changed = RopeConfig(**{**vars(rope), "original_max_position_embeddings": b.config.max_position_embeddings})
    b.frequencies(yarn_inverse_frequencies(b.config.qk_rope_head_dim, rope.theta, changed))


def yarn_magnitude_in_the_table(b):
    rope: RopeConfig = b.config.rope
    b.frequencies(yarn_inverse_frequencies(b.config.qk_rope_head_dim, rope.theta, rope), rope.magnitude(rope.mscale))


def yarn_scale_forgotten(b):
    b.each_scale(b.config.qk_head_dim**-0.5)


def yarn_scale_not_squared(b):
    b.each_scale(b.config.qk_head_dim**-0.5 * b.config.rope.magnitude(b.config.rope.mscale_all_dim))


def scale_of_the_latent_width(b):
    width = b.config.kv_lora_rank + b.config.qk_rope_head_dim
    b.each_scale(b.config.softmax_scale * (b.config.qk_head_dim / width) ** 0.5)


def scale_without_the_rotary_part(b):
    b.each_scale(b.config.softmax_scale * (b.config.qk_head_dim / b.config.qk_nope_head_dim) ** 0.5)


def kv_halves_swapped(b):
    for attention in b.modules(DeepseekV2AttentionMLA):
        weight = attention.kv_b_proj.weight.data
        nope, values = weight.view(attention.num_heads, 2, -1).unbind(1)
        b.fill(weight, torch.stack((values, nope), dim=1).view_as(weight))


def latent_norm_skipped(b):
    b.set(prepare_mla, "rms_norm_torch", lambda x, weight, eps: x)


def norm_weight_taken_as_one_plus(b):
    for norm in b.modules(RMSNorm):
        b.fill(norm.weight.data, norm.weight.data + 1.0)


EVERYWHERE = (
    renormalisation_flipped, scoring_flipped, shared_experts_dropped, shared_experts_scaled, gate_and_up_swapped,
    rope_pairs_by_halves, rope_not_applied, yarn_frequencies_forgotten, yarn_from_the_served_length,
    yarn_magnitude_in_the_table, yarn_scale_forgotten, yarn_scale_not_squared, scale_of_the_latent_width,
    scale_without_the_rotary_part, kv_halves_swapped, latent_norm_skipped, norm_weight_taken_as_one_plus,
)  # fmt: skip
MUTATIONS = {
    "dsv2": (*EVERYWHERE, router_takes_the_worst),
    "dsv2g-k3": (
        *EVERYWHERE, scale_forgotten, scale_applied_twice, group_limit_ignored, one_group_too_many,
        group_scored_by_its_sum,
    ),
    "dsv3": (
        *EVERYWHERE, scale_forgotten, scale_applied_twice, group_limit_ignored, one_group_too_many,
        group_scored_by_its_best, correction_bias_ignored, biased_weights,
    ),
}  # fmt: skip


@contextmanager
def broken(harness, mutation):
    with Breaker(harness) as breaker, torch.no_grad():
        mutation(breaker)
        yield


class TestDeepseekMutations(CustomTestCase):
    def test_every_broken_rule_is_noticed(self):
        prompt = torch.randint(0, 512, (150,), generator=torch.Generator().manual_seed(11)).tolist()
        for checkpoint, mutations in MUTATIONS.items():
            with tempfile.TemporaryDirectory() as folder:
                hf_model = save_tiny_checkpoint(checkpoint, folder)
                # test_shared_fusion.py breaks the fused form.
                with override_server_args(disable_shared_experts_fusion=True):
                    harness = ModelHarness(folder)
            with torch.no_grad():
                truth = hf_model(torch.tensor([prompt])).logits[0].log_softmax(-1)

            def difference(harness=harness, truth=truth):
                """Largest difference of log-probabilities: a prefill of 100 tokens, then 50 absorbed ones."""
                harness.reset()
                request = harness.new_request()
                rows = harness.extend([(request, prompt[:100])]) + harness.extend([(request, prompt[100:])])
                return (torch.cat(rows) - truth).abs().max().item()

            for mutation in mutations:
                with self.subTest(checkpoint=checkpoint, rule=mutation.__name__):
                    with broken(harness, mutation):
                        found = difference()
                    print(f"{checkpoint:8} {mutation.__name__:32} {found:.4f}")
                    self.assertGreater(found, WRONG)
                    self.assertLess(difference(), RIGHT, "the mutation was not undone")


if __name__ == "__main__":
    unittest.main()

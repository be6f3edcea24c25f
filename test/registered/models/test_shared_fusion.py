"""Shared experts stored as routed ones: weights, routing, which steps use them, and that no token changes.

The unfused block, which other tests hold against transformers, is the truth of the fused one.
"""

import json
import tempfile
import unittest
from pathlib import Path
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.kernels.ops.moe.topk import NO_SHARED
from sglang.kernels.registry import REGISTRY
from sglang.srt.arg_groups.stream_policy import SITE_RULES, FusionChoice, StreamSettings, plan_streams, resolve_streams
from sglang.srt.configs.deepseek import DeepseekConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.configs.qwen3_5 import Qwen3_5Config
from sglang.srt.distributed.parallel_state import ParallelState, override_parallel_state
from sglang.srt.layers.moe.fused_shared_experts import FusedSharedExperts
from sglang.srt.model_executor.runner_build import _log_streams
from sglang.srt.model_loader.dummy import iterate_dummy
from sglang.srt.model_loader.loader import load_model
from sglang.srt.models.checkpoint_model import CheckpointModel, WeightLoadError
from sglang.srt.models.deepseek_common.moe import DeepseekV2MoE
from sglang.srt.models.deepseek_v2 import DeepseekV2ForCausalLM
from sglang.srt.models.qwen2_moe import Qwen2MoeSparseMoeBlock
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.srt.utils.multi_stream_utils import FUSED, OVERLAP, SERIAL, OverlapSite, StreamOverlap
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.ep_world import MODEL, thread_world
from sglang.test.happens_before import FakeStreamPlatform
from sglang.test.model_harness import ModelHarness
from sglang.test.process_ranks import use_fakes
from sglang.test.shared_fusion_cases import SharedFusionCases
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import override_tp_group, run_ranks, thread_ranks
from sglang.test.tiny_checkpoints import TINY_CONFIGS
from sglang.test.tiny_tasks import heldout_questions

register_cpu_ci(est_time=15, suite="stage-b-test-cpu")

use_fakes()

# Two shared experts, unscaled and scaled weights, one gated one, and one that is two slots wide.
BLOCKS = {
    "dsv2": TINY_CONFIGS["dsv2"],
    "dsv2g-k3": TINY_CONFIGS["dsv2g-k3"],
    "dsv3": TINY_CONFIGS["dsv3"],
    "q35moe": TINY_CONFIGS["q35moe"],
    "q35moe-2": {**TINY_CONFIGS["q35moe"], "shared_expert_intermediate_size": 128},
}
FP8_SIZES = {"hidden_size": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
ARCHITECTURES = {"d": "DeepseekV3ForCausalLM", "q": "Qwen3_5MoeForCausalLM"}


def fixed(*modes):
    """A site that takes (most tokens, mode) steps."""
    return OverlapSite("test", enabled=True, modes=modes)


class OneBlock(CheckpointModel):
    """A model that is one MoE block, loaded with the dummy weights of its names."""

    packed_modules = DeepseekV2ForCausalLM.packed_modules

    def __init__(self, config, fused, site=None, quant_config=None, stream=None):
        super().__init__()
        site = site or fixed((None, FUSED if fused else OVERLAP))
        if config["model_type"].startswith("deepseek"):
            overlap = StreamOverlap(stream, site)
            self.mlp = DeepseekV2MoE(DeepseekConfig.from_hf(config), overlap, quant_config, "mlp", fused)
        else:
            text = Qwen3_5Config.from_hf(config)
            self.mlp = Qwen2MoeSparseMoeBlock(
                0, text, quant_config, stream, "mlp", support_shared_expert_fusion=fused, site=site
            )
        self.num_fused_shared_experts = self.mlp.num_fused_shared_experts
        self.load_weights(iterate_dummy(self, 3))

    @property
    def slotted(self):
        return self.mlp.shared_expert if hasattr(self.mlp, "shared_expert") else self.mlp.shared_experts


def build(name, fused, state=None, quantized=False, **options):
    sizes = FP8_SIZES if quantized else {}
    config = {**BLOCKS[name], **{key: size for key, size in sizes.items() if key in BLOCKS[name]}}
    with override_server_args(), override_parallel_state(state or ParallelState()):
        return OneBlock(config, fused, quant_config=QuantConfig(on_load=True) if quantized else None, **options)


def bytes_held(model):
    """Of all storages, each once."""
    held = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())


def rows_for(model, count=6, seed=1):
    return torch.randn(count, model.mlp.experts.hidden, generator=torch.Generator().manual_seed(seed))


class TestSlots(CustomTestCase):
    def setUp(self):
        torch.set_num_threads(1)

    def test_slots_are_the_only_storage(self):
        for name in BLOCKS:
            for quantized in (False, True):
                model, apart = build(name, True, quantized=quantized), build(name, False, quantized=quantized)
                experts, slotted = model.mlp.experts, model.slotted
                self.assertIsInstance(slotted, FusedSharedExperts)
                for matrix, stack in ((slotted.gate_up_proj, "w13_weight"), (slotted.down_proj, "w2_weight")):
                    suffixes = ("", "_scale_inv") if quantized else ("",)
                    for suffix in suffixes:
                        view, stacked = getattr(matrix, f"weight{suffix}"), getattr(experts, f"{stack}{suffix}")
                        self.assertEqual(view.data_ptr(), stacked[experts.num_experts :].data_ptr())
                        self.assertEqual(view.numel(), stacked[experts.num_experts :].numel())
                # The two gates of Qwen's block are padded to eight rows together: 16 rows instead of 9.
                extra = 7 * experts.hidden * 4 if name.startswith("q") else 0
                total = [bytes_held(each) for each in (model, apart)]
                self.assertEqual(total[0], total[1] + extra)

    def test_slots_hold_the_checkpoints_numbers(self):
        for name in ("dsv2", "q35moe"):
            model = build(name, True)
            tensors, experts = dict(iterate_dummy(model, 3)), model.mlp.experts
            shared = "shared_experts" if name == "dsv2" else "shared_expert"
            gate, up, down = (tensors[f"mlp.{shared}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            for slot in range(experts.num_shared):
                part = slice(64 * slot, 64 * slot + 64)
                w13, w2 = (stack[experts.num_experts + slot] for stack in (experts.w13_weight, experts.w2_weight))
                self.assertTrue(torch.equal(w13, torch.cat((gate[part], up[part]))))
                self.assertTrue(torch.equal(w2, down[:, part]))

    def test_a_checkpoint_has_the_same_names_either_way_and_none_may_miss(self):
        for name in BLOCKS:
            model, apart = build(name, True), build(name, False)
            shapes = [{k: v.shape for k, v in each.checkpoint_tensors().items()} for each in (model, apart)]
            self.assertEqual(*shapes)
            tensors = dict(iterate_dummy(apart, 3))
            gone = next(key for key in tensors if "shared_expert" in key and "up_proj" in key)
            with self.assertRaisesRegex(WeightLoadError, rf"missing \(1\):\n *{gone}"):
                model.load_weights((k, v) for k, v in tensors.items() if k != gone)
            with self.assertRaisesRegex(WeightLoadError, "wrong shape"):
                model.load_weights({**tensors, gone: tensors[gone][:-1]}.items())
            with self.assertRaisesRegex(WeightLoadError, "unexpected"):
                extra = f"mlp.experts.{model.mlp.experts.num_experts}.up_proj.weight"
                model.load_weights({**tensors, extra: tensors[gone]}.items())

    def test_block_and_loader_must_agree(self):
        model = build("q35moe", True)
        for known in (0, 2):
            model.num_fused_shared_experts = known
            with self.assertRaisesRegex(AssertionError, f"the loader knows of {known}"):
                model.load_weights(iterate_dummy(model, 3))

    def test_another_number_of_columns_is_refused(self):
        model = build("dsv2", True)
        x, block = rows_for(model), model.mlp
        block.topk.shared = block.topk.shared._replace(num=1)
        with self.assertRaisesRegex(ValueError, "expected 2 experts per token, or 2 shared ones besides, got 3"):
            block(x, None)


class TestBlocks(CustomTestCase):
    """Fused blocks against unfused ones, on one rank and over several."""

    def setUp(self):
        torch.set_num_threads(1)

    def assert_close(self, found, wanted, bound=2e-5):
        self.assertLess(float((found - wanted).abs().max() / wanted.abs().max()), bound)

    def test_every_mode_of_every_block(self):
        for name in BLOCKS:
            for quantized in (False, True):
                apart = build(name, False, quantized=quantized)
                x = rows_for(apart)
                for mode in (FUSED, OVERLAP, SERIAL):
                    model = build(name, True, quantized=quantized, site=fixed((None, mode)))
                    for count in (0, 1, 6):
                        with self.subTest(block=name, mode=mode, quantized=quantized, rows=count):
                            found, wanted = model.mlp(x[:count], None), apart.mlp(x[:count], None)
                            self.assertEqual(found.shape, wanted.shape)
                            if count:
                                self.assert_close(found, wanted)

    def test_ranks(self):
        for name, (world, groups, ep) in (
            ("q35moe", (2, 1, 1)), ("dsv2", (2, 1, 1)), ("dsv3", (2, 1, 2)), ("q35moe-2", (4, 1, 2)),
            ("dsv2g-k3", (4, 1, 4)), ("q35moe", (2, 2, 1)), ("dsv2", (4, 2, 2)), ("q35moe", (4, 4, 4)),
        ):  # fmt: skip
            with self.subTest(block=name, world=world, groups=groups, ep=ep):
                truth = build(name, False)
                states = thread_world(world, groups, ep)
                models = [build(name, True, state, site=fixed((None, SERIAL))) for state in states]
                step = MODEL.step([5, 3, 4, 0][:groups])
                xs = [rows_for(truth, len(rows), seed) for seed, rows in enumerate(step.x)]

                def serve(rank, models=models, states=states, step=step, xs=xs):
                    group = states[rank].attn_dp_rank
                    return models[rank].mlp(xs[group], step.batch_of(group))

                for found, state in zip(run_ranks(serve, range(world)), states):
                    wanted = truth.mlp(xs[state.attn_dp_rank], None)
                    if len(wanted):
                        self.assert_close(found, wanted)
                # Only ranks that hold the same part of both may run them apart.
                alike = groups == 1 and ep == 1
                self.assertEqual({not model.slotted.fixed_reason for model in models}, {alike})

    def test_a_step_takes_the_mode_of_its_size(self):
        platform = FakeStreamPlatform()
        with override_platform(platform):
            site = fixed((2, FUSED), (4, OVERLAP), (None, SERIAL))
            for name in ("dsv3", "q35moe"):
                model = build(name, True, site=site, stream=platform.create_stream())
                x, seen = rows_for(model), []
                for count in range(7):
                    with mock.patch.object(
                        FusedSharedExperts, "forward", autospec=True, side_effect=FusedSharedExperts.forward
                    ) as mlp:
                        waits = platform.observe(lambda: model.mlp(x[:count], None)).waits  # noqa: B023
                    seen.append(SERIAL if mlp.called and not waits else OVERLAP if mlp.called else FUSED)
                self.assertEqual(seen, [FUSED] * 3 + [OVERLAP] * 2 + [SERIAL] * 2)

    def test_every_broken_rule_is_noticed(self):
        def weight(block, factor):
            block.topk.shared = block.topk.shared._replace(weight=block.topk.shared.weight * factor)

        def without_gate(block):
            whole = type(block.topk).forward
            shared = block.topk.shared._replace(gated=False)
            block.topk.forward = lambda logits, fused: whole(block.topk, logits[:, :-1], fused)
            block.topk.shared = shared

        rules = {
            "no slot": lambda block: setattr(block.topk, "shared", NO_SHARED),
            "one slot too few": lambda block: (
                setattr(block.topk, "shared", block.topk.shared._replace(num=1)),
                setattr(block.experts, "num_shared", 1),
            ),
            "weight": lambda block: weight(block, 0.5),
            "scaled twice": lambda block: weight(block, block.topk.rule.scale),
            "divided by the scale": lambda block: weight(block, 1 / block.topk.rule.scale),
            "gate forgotten": without_gate,
            "another gate": lambda block: block._gates[-8:].copy_(block._gates[:8]),
            "slot empty": lambda block: block.experts.w13_weight[-1].zero_(),
            "slot's halves swapped": lambda block: block.experts.w13_weight[-1].copy_(
                torch.cat(block.experts.w13_weight[-1].chunk(2)[::-1])
            ),
        }
        scaled = ("scaled twice", "divided by the scale")
        applicable = {
            "dsv2": [r for r in rules if "gate" not in r and r not in scaled],
            "dsv2g-k3": [r for r in rules if "gate" not in r],
            "dsv3": [r for r in rules if "gate" not in r and r != "one slot too few"],
            "q35moe": [r for r in rules if r not in (*scaled, "one slot too few")],
        }
        for name, names in applicable.items():
            truth = build(name, False)
            x = rows_for(truth)
            wanted = truth.mlp(x, None)
            for rule in names:
                with self.subTest(block=name, rule=rule), torch.no_grad():
                    broken = build(name, True)
                    rules[rule](broken.mlp)
                    error = (broken.mlp(x, None) - wanted).abs().max() / wanted.abs().max()
                    self.assertGreater(float(error), 1e-3)

    def test_each_expert_parallel_rank_adds_its_part(self):
        states = thread_world(2, 1, 2)
        models = [build("dsv3", True, state) for state in states]
        for model in models:
            model.mlp.topk.shared = model.mlp.topk.shared._replace(weight=1.0)
        x = rows_for(models[0])
        wanted = build("dsv3", False).mlp(x, None)
        found = run_ranks(lambda rank: models[rank].mlp(x.clone(), None), range(2))[0]
        self.assertGreater(float((found - wanted).abs().max() / wanted.abs().max()), 1e-2)


class TestRefusals(CustomTestCase):
    def refusal(self, name, backend="none", quant_config=None, **changes):
        config = {**BLOCKS[name], **changes, "architectures": [ARCHITECTURES[name[0]]]}
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            model = ModelConfig.from_path(folder)
        return model.text.shared_experts.fusion_refusal(quant_config, backend)

    def test_reasons(self):
        for name in BLOCKS:
            self.assertEqual(self.refusal(name), "")
            self.assertEqual(self.refusal(name, quant_config=QuantConfig(), moe_intermediate_size=128,
                                          shared_expert_intermediate_size=256), "")  # fmt: skip
            self.assertIn("--moe-a2a-backend mori", self.refusal(name, "mori"))
        uneven = self.refusal("q35moe", shared_expert_intermediate_size=96)
        self.assertEqual(uneven, "shared experts are 96 wide, and routed ones 64")
        for changes in ({"n_shared_experts": 0}, {"first_k_dense_replace": 3}):
            self.assertEqual(self.refusal("dsv3", **changes), "the model has no shared experts")
        self.assertIn("not split at fp8 blocks", self.refusal("dsv2", quant_config=QuantConfig()))
        self.assertEqual(self.refusal("dsv3", quant_config=QuantConfig()), "")

    def test_formats_must_agree_in_every_layer(self):
        for skipped in ("model.layers.2.mlp.shared_expert", r"shared_expert.down_proj", "model.layers.3.mlp.experts"):
            config = QuantConfig(skipped=(skipped,))
            self.assertRegex(self.refusal("q35moe", quant_config=config), r"layers.\d.mlp: .* not quantised alike")
        self.assertEqual(self.refusal("q35moe", quant_config=QuantConfig(skipped=("model.layers.1.mlp",))), "")

    def test_an_uneven_model_is_served_apart(self):
        with tempfile.TemporaryDirectory() as folder:
            config = {**BLOCKS["q35moe"], "shared_expert_intermediate_size": 96, "architectures": [ARCHITECTURES["q"]]}
            Path(folder, "config.json").write_text(json.dumps(config))
            with override_server_args():
                model = load_model(ModelConfig.from_path(folder), "dummy")
        self.assertEqual(model.num_fused_shared_experts, 0)


class TestModels(CustomTestCase):
    """Whole models: fusion x alt streams at every site x tensor-parallel ranks."""

    MODELS = {"q35": "Qwen3_5ForCausalLM", "q35moe-ns": ARCHITECTURES["q"], "dsv2g-k3": "DeepseekV2ForCausalLM"}

    def setUp(self):
        torch.set_num_threads(1)
        self.platform = FakeStreamPlatform()
        self.enterContext(override_platform(self.platform))
        self.folder = self.enterContext(tempfile.TemporaryDirectory())

    def logprobs(self, name, fused, sites, ranks=1):
        forced = {rule.name: rule.name in sites for rule in SITE_RULES}
        plan = resolve_streams(self.platform, StreamSettings(forced=forced), ServerArgs(), FusionChoice(fused))
        harnesses = []
        for rank in thread_ranks(ranks):
            with override_tp_group(rank), override_server_args(disable_shared_experts_fusion=not fused):
                harnesses.append(ModelHarness(self.folder, 64, 4, load_format="dummy", streams=plan))
        slots = 0 if not fused or name == "q35" else 2 if name.startswith("dsv2") else 1
        self.assertEqual(harnesses[0].model.num_fused_shared_experts, slots)

        def serve(harness):
            requests = [harness.new_request(), harness.new_request()]
            out = harness.extend([(requests[0], [5, 7, 11, 200]), (requests[1], [3])])
            return torch.cat(out + harness.decode([(requests[0], 9), (requests[1], 4)]))

        return run_ranks(serve, harnesses)[0]

    def test_logprobs_are_the_same(self):
        for name, architecture in self.MODELS.items():
            config = {**TINY_CONFIGS[name], "architectures": [architecture]}
            Path(self.folder, "config.json").write_text(json.dumps(config))
            wanted = self.logprobs(name, False, ())
            family = "qwen3_5." if name.startswith("q") else "deepseek."
            sites = [rule.name for rule in SITE_RULES if rule.name.startswith(family)]
            for fused in (False, True):
                for chosen in ((), *((site,) for site in sites), tuple(sites)):
                    # Ranks as threads would share the fake platform's current stream: one rank where streams are.
                    for ranks in (1,) if chosen else (1, 2):
                        with self.subTest(model=name, fused=fused, sites=chosen, ranks=ranks):
                            found = self.logprobs(name, fused, chosen, ranks)
                            self.assertLess(float((found - wanted).abs().max()), 1e-4)
                            self.assertTrue(torch.equal(found.argmax(-1), wanted.argmax(-1)))


class TestEmbedded(CustomTestCase):
    def test_a_trained_model_answers_alike_alone_and_in_company(self):
        questions = [question.text for question in heldout_questions(24, seed=1)]
        for name in ("qwen3.5-moe-tiny", "deepseek-v2-tiny"):
            answers = []
            for disabled in (False, True):
                for running in (1, 24):
                    engine = EngineHarness(
                        str(EMBEDDED_MODELS[name]), max_running_requests=running, random_seed=1,
                        disable_shared_experts_fusion=disabled,
                    )  # fmt: skip
                    for number, question in enumerate(questions):
                        params = SamplingParams(temperature=0.0, max_new_tokens=8)
                        engine.submit(f"r{number}", list(question.encode()), params)
                    results = engine.run()
                    answers.append([results[f"r{number}"].output_ids for number in range(len(questions))])
                    self.assertEqual(engine.runner.model.num_fused_shared_experts > 0, not disabled)
            self.assertTrue(all(found == answers[0] for found in answers[1:]), name)


class TestOverFakes(SharedFusionCases, CustomTestCase):
    """What test_shared_fusion_gpu.py does on a device; AITER is the fake."""

    def setUp(self):
        torch.set_num_threads(1)
        self.enterContext(override_platform(RocmOverFakesPlatform(find_fakes())))

    def test_the_log_of_the_first_rank_says_what_speaks_against_the_settings(self):
        """Logged before anything is loaded, and once, by the first rank."""
        runner, name = "sglang.srt.model_executor.runner_build", str(EMBEDDED_MODELS["qwen3.5-moe-tiny"])
        asked = {"SGLANG_ALT_STREAM": "1", "SGLANG_ROCM_USE_MULTI_STREAM": "1", "SGLANG_QK_NORM_ALT_STREAM": "1"}
        wanted = (
            "SGLANG_ALT_STREAM asks for overlap .* shared-expert fusion is on .*--disable-shared-experts-fusion",
            "SGLANG_ROCM_USE_MULTI_STREAM has no effect: this model",
            "GPU_MAX_HW_QUEUES=1 gives overlapping streams too few hardware queues",
        )
        with mock.patch.dict("os.environ", {**asked, "GPU_MAX_HW_QUEUES": "1"}):
            with self.assertLogs(runner, "INFO") as log:
                EngineHarness(name, max_total_tokens=64, random_seed=1)
            said = [line for line in log.output if line.startswith("WARNING")]
            self.assertEqual(len(said), len(wanted), said)
            for line, words in zip(said, wanted):
                self.assertRegex(line, words)
            self.assertRegex("\n".join(log.output), "INFO.*overlap qwen3_5.qk_norm: on")
            self.assertLess(log.output.index(said[-1]), next(i for i, line in enumerate(log.output) if "KV" in line))
            with override_parallel_state(ParallelState(world=thread_ranks(2)[1])):
                with self.assertNoLogs(runner, "WARNING"):
                    _log_streams(plan_streams(ServerArgs()))

    def test_by_aiter(self):
        REGISTRY.start_serving()  # a failing kernel raises instead of being replaced
        self.addCleanup(setattr, REGISTRY, "serving", False)
        self.check_aiter()


if __name__ == "__main__":
    unittest.main()

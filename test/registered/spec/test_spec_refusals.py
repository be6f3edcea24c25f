"""Speculation that cannot be served is refused at start; requests at its limits have the same output as without."""

import itertools
import json
import shutil
import tempfile
import unittest
from pathlib import Path

from safetensors.torch import load_file, save_file

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.arg_groups.parse import read
from sglang.srt.arg_groups.plan import evaluate
from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.mem_cache.pool_plan import PoolPlanError
from sglang.srt.model_executor.memory_plan import DRAFT_LAYER, plan_needs
from sglang.srt.model_loader.weight_utils import WeightLoadError
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, ServerArgsError
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.drafters import RuleDrafter
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=12, suite="stage-b-test-cpu")

MODELS = {name: str(EMBEDDED_MODELS[name]) for name in ("deepseek-v3-tiny", "qwen3.5-moe-tiny")}
SPEC = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3}


def storages(module):
    return {held.untyped_storage()._cdata: held.untyped_storage().nbytes() for held in module.state_dict().values()}


class TestFlags(CustomTestCase):
    def test_each_is_named_with_its_fix(self):
        cases = (
            ({"speculative_eagle_topk": 2}, "--speculative-eagle-topk 2 requests a tree of draft tokens: use 1"),
            ({"speculative_num_draft_tokens": 3}, "3 must be --speculative-num-steps 3 . 1: use 4"),
            ({"speculative_num_steps": 0}, "speculative-num-steps.*1"),
            ({"speculative_num_steps": 9}, "speculative-num-steps.*8"),
            ({"speculative_algorithm": "NGRAM"}, "NGRAM.*(NEXTN|EAGLE)"),
            ({"speculative_algorithm": "EAGLE3"}, "EAGLE3.*(NEXTN|EAGLE)"),
            ({"speculative_algorithm": None}, "--speculative-num-steps was given without --speculative-algorithm"),
            ({"enable_mixed_chunk": True}, "--enable-mixed-chunk and --speculative-algorithm cannot be combined"),
        )
        for name, path in MODELS.items():
            for change, message in cases:
                with self.subTest(name, **change):
                    flags = []
                    for key, value in {**SPEC, **change}.items():
                        flag = f"--{key.replace('_', '-')}"
                        flags += [] if value is None else [flag] if value is True else [flag, str(value)]
                    errors = evaluate(read(["--model-path", path, *flags])).errors
                    self.assertRegex("\n".join(errors), message)


class TestFolders(CustomTestCase):
    """Model folders that a user may have."""

    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def folder(self, name, config=None, tensors=None):
        """A copy of an embedded model with keys of its config, and tensors, replaced; None drops one."""
        path = self.root / name
        shutil.copytree(MODELS[name], path)
        written = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**written, **(config or {})}))
        if tensors is not None:
            held = load_file(path / "model.safetensors")
            save_file(tensors(held), path / "model.safetensors", {"format": "pt"})
        return str(path)

    def refused(self, error, message, path, **server_args):
        with self.assertRaisesRegex(error, message):
            EngineHarness(path, **{**SPEC, "max_total_tokens": 256, **server_args})

    def test_no_layer(self):
        v3 = self.folder("deepseek-v3-tiny", {"num_nextn_predict_layers": 0})
        self.refused(ServerArgsError, "needs an MTP layer: .*key num_nextn_predict_layers is 0 or missing", v3)
        qwen = self.folder("qwen3.5-moe-tiny", tensors=lambda held: {k: v for k, v in held.items() if "mtp" not in k})
        self.refused(WeightLoadError, "contains no tensor mtp", qwen)

    def test_a_layer_of_wrong_shapes(self):
        def cut(held):
            return {name: value[:-1].clone() if name == "mtp.fc.weight" else value for name, value in held.items()}

        self.refused(WeightLoadError, r"mtp\.fc\.weight", self.folder("qwen3.5-moe-tiny", tensors=cut))

    def test_the_layer_of_another_model(self):
        other = self.folder("deepseek-v3-tiny", {"vocab_size": 300})
        message = "key vocab_size is 300, and that of the model"
        self.refused(ConfigError, message, MODELS["deepseek-v3-tiny"], speculative_draft_model_path=other)
        self.refused(
            ConfigError, "key hidden_size", MODELS["deepseek-v3-tiny"],
            speculative_draft_model_path=self.folder("qwen3.5-moe-tiny", {"hidden_size": 32}),
        )  # fmt: skip

    def test_a_model_without_such_a_class(self):
        path = str(EMBEDDED_MODELS["deepseek-v2-tiny"])
        self.refused(ServerArgsError, "needs an MTP layer", path)


class TestMemory(CustomTestCase):
    def test_a_pool_that_holds_no_verify_step(self):
        for name, path in MODELS.items():
            with self.subTest(name):
                with self.assertRaisesRegex(PoolPlanError, "KV for 5 tokens, and a request .* needs 6 .*: raise --max"):
                    EngineHarness(path, max_total_tokens=5, **SPEC)
                harness = EngineHarness(path, max_total_tokens=6, **SPEC)
                harness.submit("r", [5], SamplingParams(max_new_tokens=9, temperature=0.0, ignore_eos=True))
                self.assertEqual(len(harness.run()["r"].output_ids), 1)
        with self.assertRaisesRegex(PoolPlanError, "KV for 16 tokens, and .* needs 18"):
            EngineHarness(path, max_total_tokens=31, page_size=16, **SPEC)

    def test_requests_as_long_as_the_pool_allows(self):
        """Two at a time in a pool for one, to its last token; the later of equal prompts starts from a cached one."""
        cases = ((steps, page, overlap) for steps in (1, 3) for page, overlap in ((1, True), (4, False)))
        for (name, path), (steps, page, overlap) in itertools.product(MODELS.items(), cases):
            with self.subTest(name, steps=steps, page=page, overlap=overlap):
                spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": steps}
                memory = {"page_size": page, "max_running_requests": 2}
                harness = EngineHarness(path, max_total_tokens=32, overlap=overlap, **memory, **spec)
                limit = harness.scheduler.config.max_req_len
                self.assertEqual(limit, 32 - -(-2 * (steps - 1) // page) * page)
                plain = EngineHarness(path, max_total_tokens=256, context_length=limit, **memory)
                long = list(range(7, 7 + limit - 1))
                for engine in (harness, plain):
                    for number, prompt in enumerate(([5], long, long, long[:-1], long[: limit // 2])):
                        params = SamplingParams(temperature=0.7, sampling_seed=number, ignore_eos=True)
                        engine.submit(f"r{number}", prompt, params)
                answers = {rid: result.output_ids for rid, result in plain.run().items()}
                self.assertEqual(len(answers["r0"]), limit - 1)
                self.assertEqual({rid: result.output_ids for rid, result in harness.run().items()}, answers)
                self.assertEqual(harness.scheduler.metrics.num_retracted_reqs, 0)

    def test_the_layer_is_counted(self):
        for name, path in MODELS.items():
            with self.subTest(name):
                harness = EngineHarness(path, max_total_tokens=64, **SPEC)
                loaded = harness.runner.loaded
                own = storages(loaded.draft).items() - storages(loaded.module).items()
                needed = plan_needs(harness.args, harness.model_config, "cpu", {}).num_bytes
                # Buffers that no checkpoint holds, as tables of positions, are counted too.
                tables = needed[DRAFT_LAYER] - sum(size for _, size in own)
                self.assertGreaterEqual(tables, 0)
                self.assertLess(tables, 0.2 * needed[DRAFT_LAYER])
                plain = evaluate(ServerArgs(model_path=path))
                without = plan_needs(plain.args, plain.model_config, "cpu", {}).num_bytes
                self.assertEqual({**without, DRAFT_LAYER: needed[DRAFT_LAYER]}, needed)


class TestEdges(CustomTestCase):
    """Requests at the limits of a step, at both temperatures: the output is as without speculation."""

    def check(self, path, prompts, **fields):
        found = []
        for spec in ({}, SPEC, {**SPEC, "speculative_num_steps": 1}):
            harness = EngineHarness(path, max_total_tokens=1024, context_length=32, **spec)
            for number, prompt in enumerate(prompts):
                for warmth in (0.0, 0.7):
                    params = SamplingParams(**{"temperature": warmth, "sampling_seed": number, **fields})
                    harness.submit(f"{number} {warmth}", prompt, params)
            results = harness.run()
            found.append({rid: (result.output_ids, result.finish_reason) for rid, result in results.items()})
        self.assertEqual(found[1], found[0])
        self.assertEqual(found[2], found[0])
        return found[0]

    def test_answers(self):
        for name, path in MODELS.items():
            vocab = ModelConfig.from_path(path).vocab_size
            prompts = [[7], [9, 8, 7], [(5 * i) % vocab for i in range(31)], [(3 * i) % vocab for i in range(29)]]
            for fields in ({"max_new_tokens": 1}, {"max_new_tokens": 2}, {}, {"ignore_eos": True}):
                with self.subTest(name, **fields):
                    answers = self.check(path, prompts, **fields)
                    if fields.get("ignore_eos"):  # up to the limit of the context
                        self.assertEqual([len(answers[f"{i} 0.0"][0]) for i in range(4)], [31, 29, 1, 3])

    def test_the_end_as_the_first_draft(self):
        for path in MODELS.values():
            harness = EngineHarness(path, max_total_tokens=1024, **SPEC)
            plain = EngineHarness(path, max_total_tokens=1024)
            eos = harness.model_config.eos_token_ids[0]
            harness.worker.speculator.drafter = RuleDrafter(harness.memory, lambda req, known, n, eos=eos: [eos] * n, 3)
            for engine in (plain, harness):
                for number in range(4):
                    engine.submit(
                        f"r{number}", [50 + number, 43, 49, 61], SamplingParams(max_new_tokens=8, temperature=0.0)
                    )
            answers = {rid: result.output_ids for rid, result in plain.run().items()}
            self.assertTrue(any(ids[-1] == eos for ids in answers.values()))
            self.assertEqual({rid: result.output_ids for rid, result in harness.run().items()}, answers)

    def test_a_client_that_goes_in_each_phase(self):
        """Abort while queued, between chunks, after the prompt, between verify steps: no memory is leaked."""
        for path in MODELS.values():
            answers = set()
            for phase in range(7):
                harness = EngineHarness(path, max_total_tokens=256, chunked_prefill_size=8, **SPEC)
                params = SamplingParams(max_new_tokens=16, temperature=0.0, ignore_eos=True)
                harness.submit("gone", list(range(20)), params)
                harness.submit("stays", [9, 8, 7], params)
                for _ in range(phase):
                    harness.step()
                harness.inbox.append(AbortReq(rid="gone"))
                results = harness.run()
                self.assertEqual(results["gone"].finish_reason.type, "abort")
                answers.add(tuple(results["stays"].output_ids))
            self.assertEqual(len(answers), 1)


if __name__ == "__main__":
    unittest.main()

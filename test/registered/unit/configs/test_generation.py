"""What generation_config.json, config.json and the tokenizer say about generation: end tokens and sampling defaults."""

import json
import tempfile
import unittest
from pathlib import Path

from sglang.embedded_models import default_model_path
from sglang.srt.arg_groups.plan import evaluate
from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.generation import sampling_defaults
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.sampling.sampling_params import SamplingParams, SamplingParamsError
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

CONFIG = json.loads((default_model_path() / "config.json").read_text())
VOCAB = CONFIG["vocab_size"]


class FolderCase(CustomTestCase):
    def setUp(self):
        self.root = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def folder(self, generation=None, **config):
        """A model folder without weights; None removes a key of config.json."""
        path = self.root / f"m{len(list(self.root.iterdir()))}"
        path.mkdir()
        document = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
        (path / "config.json").write_text(json.dumps(document))
        if generation is not None:
            (path / "generation_config.json").write_text(json.dumps(generation))
        return str(path)


class TestEndTokens(FolderCase):
    def test_union_of_all_files_in_both_forms(self):
        nested = {**CONFIG, "eos_token_id": [5, 6]}
        cases = (
            (self.folder({"eos_token_id": 258}), (258, 257)),
            (self.folder({"eos_token_id": [258, 257]}), (258, 257)),
            (self.folder({}), (257,)),
            (self.folder(), (257,)),
            (self.folder(eos_token_id=[257, 0]), (257, 0)),
            (self.folder({"eos_token_id": 0}, eos_token_id=None), (0,)),
            (self.folder({"eos_token_id": []}, eos_token_id=None), ()),
            (self.folder({"eos_token_id": 7}, text_config=nested, eos_token_id=8), (7, 5, 6, 8)),
        )
        for folder, expected in cases:
            with self.subTest(expected=expected):
                self.assertEqual(ModelConfig.from_path(folder).eos_token_ids, expected)

    def test_ids_that_are_none_of_the_vocabulary_name_file_and_key(self):
        for value in ("x", 10**12, -5, True, 1.0, VOCAB, [257, VOCAB], [257, None], [[257]], {"id": 1}):
            for arguments, file, key in (
                ({"generation": {"eos_token_id": value}}, "generation_config.json", "key eos_token_id"),
                ({"eos_token_id": value}, "config.json", "key eos_token_id"),
                ({"text_config": {**CONFIG, "eos_token_id": value}}, "config.json", "text_config.eos_token_id"),
            ):
                with self.subTest(value=value, key=key), self.assertRaises(ConfigError) as caught:
                    ModelConfig.from_path(self.folder(**arguments))
                self.assertEqual(Path(caught.exception.source).name, file)
                self.assertIn(key, str(caught.exception))

    def test_the_tokenizer_adds_its_end_tokens(self):
        model = ModelConfig.from_path(self.folder({"eos_token_id": 258}))
        self.assertEqual(model.with_tokenizer_end((258, 9), "t").eos_token_ids, (258, 257, 9))
        with self.assertRaisesRegex(ConfigError, f"id {VOCAB}.*does not belong"):
            model.with_tokenizer_end((VOCAB,), "t")

    def tokenizer(self, **config):
        folder = self.root / f"t{len(list(self.root.iterdir()))}"
        return Tokenizer.from_path(write_tokenizer(str(folder), byte_level_tokenizer(), **config))

    def test_what_a_tokenizer_calls_an_end(self):
        self.assertEqual(self.tokenizer().eos_token_ids, (1,))
        self.assertEqual(self.tokenizer(eos_token={"content": "<s>", "special": True}).eos_token_ids, (0,))
        self.assertEqual(self.tokenizer(eot_token="<|pad|>").eos_token_ids, (1, 2))
        self.assertEqual(self.tokenizer(extra_special_tokens={"eot_token": "<|pad|>"}).eos_token_ids, (1, 2))
        with self.assertLogs("sglang.srt.utils.hf_tokenizer", "WARNING") as logs:
            self.assertEqual(self.tokenizer(eos_token="<nowhere>").eos_token_ids, ())
        self.assertIn("<nowhere>", logs.output[0])


class TestSamplingDefaults(FolderCase):
    def test_values_at_and_beyond_each_end(self):
        greedy = {"temperature": 0.0}
        for given, expected in (
            ({"top_k": 0}, {"top_k": -1}),
            ({"top_k": 20.0}, {"top_k": 20}),
            ({"top_k": -1}, {"top_k": -1}),
            ({"top_k": 1}, {"top_k": 1}),
            ({"top_k": None, "top_p": None}, {}),
            ({"top_p": 1}, {"top_p": 1}),
            ({"top_p": 0}, {"top_p": 1e-30}),
            ({"min_p": 0.0}, {"min_p": 0.0}),
            ({"min_p": 1.0}, {"min_p": 1.0}),
            ({"temperature": 0}, {"temperature": 0}),
            ({"repetition_penalty": 2.0}, {"repetition_penalty": 2.0}),
            ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
            ({"do_sample": None, "temperature": 0.6}, {"temperature": 0.6}),
            ({"do_sample": False, "temperature": 0.6, "top_k": 20}, greedy),
            ({"do_sample": False, "repetition_penalty": 1.1}, {**greedy, "repetition_penalty": 1.1}),
        ):
            with self.subTest(given):
                settled, _ = sampling_defaults(given)
                self.assertEqual(settled, expected)
                SamplingParams.from_request(settled).verify(VOCAB)

    def test_what_cannot_be_settled_is_refused_with_the_file(self):
        bad = [{key: value} for key in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
               for value in (True, "0.5", [1], {}, float("nan"), float("inf"), -2)]  # fmt: skip
        bad += [{"top_k": 20.5}, {"top_p": 1.01}, {"min_p": 1.01}, {"repetition_penalty": 2.5}, {"temperature": 1e31},
                {"repetition_penalty": 0}, {"do_sample": "yes"}, {"do_sample": 0}]  # fmt: skip
        for given in bad:
            with self.subTest(given), self.assertRaises(ConfigError) as caught:
                ModelConfig.from_path(self.folder(given))
            self.assertIn("generation_config.json", str(caught.exception))
            self.assertIn(f"key {next(iter(given))}", str(caught.exception))

    def test_start_says_it_and_openai_defaults_do_not_ask(self):
        folder = self.folder({"repetition_penalty": 2.5})
        flags = {"model_path": folder, "skip_tokenizer_init": True, "load_format": "dummy"}
        errors = evaluate(ServerArgs(**flags), CpuPlatform(), {}).errors
        self.assertEqual(len(errors), 1)
        for words in ("generation_config.json", "repetition_penalty = 2.5", "--sampling-defaults openai"):
            self.assertIn(words, errors[0])
        plan = evaluate(ServerArgs(**flags, sampling_defaults="openai"), CpuPlatform(), {})
        self.assertEqual((plan.errors, plan.model_config.generation_defaults), ([], {}))

    def test_the_log_says_what_was_changed(self):
        with self.assertLogs("sglang.srt.configs.model_config", "INFO") as logs:
            ModelConfig.from_path(self.folder({"do_sample": False}))
            ModelConfig.from_path(self.folder({"top_k": 0}))
        text = "\n".join(logs.output)
        self.assertIn("do_sample false: greedy", text)
        self.assertIn("top_k 0: all tokens", text)

    def test_top_k_0_of_a_request_is_off(self):
        params = SamplingParams.from_request({"top_k": 0})
        params.verify(VOCAB)
        self.assertEqual(params.top_k, -1)
        with self.assertRaises(SamplingParamsError):
            SamplingParams.from_request({"top_k": False})


if __name__ == "__main__":
    unittest.main()

"""Checkpoint folders as hostile input: a clear refusal before anything is built; and names of the embedded models."""

import json
import os
import shutil
import tempfile
import time
import unittest
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from sglang import plan
from sglang.embedded_models import EMBEDDED_MODELS, default_model_path
from sglang.srt.arg_groups.parse import read
from sglang.srt.arg_groups.plan import evaluate, plan_launch
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.chat_messages import ChatTemplateError
from sglang.srt.utils.hf_tokenizer import Tokenizer, TokenizerError
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=12, suite="stage-a-test-cpu")

DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
LESS_DEEP = '{"a":' * 80 + "1" + "}" * 80  # JSON's reader takes it
CONFIG = json.loads((default_model_path() / "config.json").read_text())


class CopyCase(CustomTestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory())) / "model"
        shutil.copytree(default_model_path(), self.folder)

    def write(self, name, content):
        text = content if isinstance(content, str) else json.dumps(content)
        (self.folder / name).write_text(text)

    def edit(self, name, **keys):
        document = json.loads((default_model_path() / name).read_text())
        self.write(name, {**document, **keys})


class TestConfig(CopyCase):
    def errors(self):
        began = time.process_time()
        errors = evaluate(ServerArgs(model_path=str(self.folder)), CpuPlatform(), {}).errors
        self.assertLess(time.process_time() - began, 10)
        return "\n".join(errors)

    def test_files_that_are_no_configs(self):
        for name in ("config.json", "generation_config.json"):
            for content, words in ((DEEP, "nests deeper"), (LESS_DEEP, "nests deeper"), ("{", "not valid JSON"),
                                   ("[]", "must hold a JSON object"), ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
                                   (" " * (33_554_433), "at most 33554432")):  # fmt: skip
                with self.subTest(name=name, words=words):
                    self.write(name, content)
                    errors = self.errors()
                    self.assertIn(words, errors)
                    self.assertEqual(errors.count(name), 1, errors)
            shutil.copy(default_model_path() / name, self.folder / name)

    def test_absurd_sizes_name_the_key(self):
        rope = CONFIG["rope_parameters"]
        for key, value in (
            ("num_hidden_layers", 10**9), ("num_hidden_layers", 10**400), ("vocab_size", 10**12),
            ("hidden_size", 10**9), ("num_attention_heads", 10**9), ("n_routed_experts", 10**9),
            ("moe_intermediate_size", 10**9),
            ("max_position_embeddings", 10**12), ("rms_norm_eps", float("inf")), ("rms_norm_eps", 10**400),
            ("rms_norm_eps", 1e-300), ("routed_scaling_factor", 1e300), ("dtype", ["float32"]), ("dtype", {}),
            ("architectures", ["x" * 10**6]), ("hidden_size", "1" * 10**6),
            ("rope_theta", {**rope, "rope_theta": float("inf")}), ("rope_theta", {**rope, "rope_theta": 1e300}),
            ("factor", {**rope, "factor": float("inf")}),
        ):  # fmt: skip
            with self.subTest(key=key):
                self.edit("config.json", **{"rope_parameters" if isinstance(value, dict) and value else key: value})
                if key == "dtype":
                    errors = "\n".join(evaluate(ServerArgs(model_path=str(self.folder)), FakeGpu(), {}).errors)
                else:
                    errors = self.errors()
                self.assertIn("architecture" if key == "architectures" else key, errors)
                self.assertLess(len(errors), 2000)

    def test_the_plan_refuses_alike(self):
        self.edit("config.json", num_hidden_layers=10**9)
        with self.assertRaises(SystemExit) as caught, redirect_stderr(StringIO()) as said:
            plan.main(["--model-path", str(self.folder), "--platform", "cpu"])
        self.assertEqual(caught.exception.code, 2)
        self.assertIn("num_hidden_layers", said.getvalue())


class FakeGpu(CpuPlatform):
    kind = "hip"


class TestTokenizerFiles(CopyCase):
    def refused(self, words):
        began = time.process_time()
        with self.assertRaisesRegex((TokenizerError, ChatTemplateError), words) as caught:
            Tokenizer.from_path(str(self.folder))
        self.assertLess(time.process_time() - began, 10)
        self.assertLess(len(str(caught.exception)), 1000)

    def test_configs(self):
        for content in (DEEP, LESS_DEEP):
            self.write("tokenizer_config.json", content)
            self.refused("tokenizer_config.json nests deeper")
        for value in ([1], "x", {"a": {}}, {"300": 5}, {"300": {}}, {"300": {"content": 1}}, {"-1": {"content": "a"}},
                      {"9" * 5000: {"content": "a"}}, {"²": {"content": "a"}}):  # fmt: skip
            with self.subTest(value):
                self.edit("tokenizer_config.json", added_tokens_decoder=value)
                self.refused("added_tokens_decoder")
        for value in (123, [1], ["x"], [{"name": "a"}], {"default": 3}, {"default": [DEEP]}, True):
            with self.subTest(value):
                self.edit("tokenizer_config.json", chat_template=value)
                self.refused("chat_template|chat templates")
        self.edit("tokenizer_config.json", chat_template="{% if a %}" * 3000 + "{% endif %}" * 3000)
        self.refused("cannot be compiled")
        self.edit("tokenizer_config.json", chat_template="x" * 300_000)
        self.refused("at most 262144")
        self.edit("tokenizer_config.json", eos_token=[1], bos_token={"content": 5}, extra_special_tokens=7)
        Tokenizer.from_path(str(self.folder))
        (self.folder / "chat_template.jinja").write_bytes(b"\xff")
        self.refused("not valid UTF-8")

    def test_processes_that_need_no_template_do_not_read_it(self):
        self.edit("tokenizer_config.json", chat_template=123)
        self.assertIsNone(Tokenizer.from_path(str(self.folder), with_template=False).chat_template)
        self.edit("tokenizer_config.json", chat_template="{% broken")
        good = self.folder / "good.jinja"
        good.write_text("{{ messages[0].content }}")
        self.assertIsNotNone(Tokenizer.from_path(str(self.folder), str(good)).chat_template)

    def test_rules_that_grow_or_never_end(self):
        def replace(pattern, content):
            return {"type": "Replace", "pattern": pattern, "content": content}

        ten = replace({"String": "x"}, "x" * 10)
        for keys, words in (
            ({"normalizer": {"type": "Sequence", "normalizers": [ten] * 9}}, "normalizer may make a text 1e"),
            ({"normalizer": replace({"Regex": "."}, "x" * 5000)}, "normalizer may make a text"),
            ({"decoder": {"type": "Sequence", "decoders": [ten] * 9}}, "decoder may make a text"),
            ({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated",
                                "invert": False}}, "failed on a text.*retry-limit"),
            ({"normalizer": replace({"Regex": "("}, "x")}, "cannot be read as a tokenizer"),
        ):  # fmt: skip
            with self.subTest(words):
                self.edit("tokenizer.json", **keys)
                self.refused(words)
        self.edit("tokenizer.json", normalizer={"type": "Sequence", "normalizers": [{"type": "NFKC"}, ten]})
        Tokenizer.from_path(str(self.folder))
        # Past the start: an error like any other, and no BaseException that would end the loop.
        late = {"type": "Split", "pattern": {"Regex": "(q+q+)+y"}, "behavior": "Isolated", "invert": False}
        self.edit("tokenizer.json", pre_tokenizer=late)
        tokenizer = Tokenizer.from_path(str(self.folder))
        for call in (tokenizer.encode, tokenizer.count_tokens):
            with self.assertRaisesRegex(TokenizerError, "failed on a text"):
                call("q" * 3000)

    def test_a_dry_run_reads_it_too(self):
        flags = ["--model-path", str(self.folder), "--dry-run", "--skip-server-warmup"]
        self.assertEqual(plan_launch(read(flags)).errors, [])
        self.edit("tokenizer_config.json", chat_template="{% for a in range(99999) %}{% for b in range(99999) %}"
                                                         "{% endfor %}{% endfor %}")  # fmt: skip
        self.assertIn("asks for more", "\n".join(plan_launch(read(flags)).errors))
        self.assertEqual(plan_launch(read([*flags, "--skip-tokenizer-init"])).errors, [])


class TestNames(CustomTestCase):
    def test_embedded_models_by_name(self):
        for name, folder in EMBEDDED_MODELS.items():
            launch = evaluate(ServerArgs(model_path=name), CpuPlatform(), {})
            self.assertEqual((launch.errors, launch.args.model_path), ([], str(folder)))
            self.assertEqual(launch.args.tokenizer_path, str(folder))
        with redirect_stdout(StringIO()):
            self.assertEqual(plan.main(["--model-path", "deepseek-v2-tiny", "--platform", "cpu"]), 0)

    def test_a_local_folder_wins_and_other_names_are_told(self):
        here = os.getcwd()
        self.addCleanup(os.chdir, here)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            shutil.copytree(default_model_path(), "deepseek-v2-tiny")
            launch = evaluate(ServerArgs(model_path="deepseek-v2-tiny"), CpuPlatform(), {})
            os.chdir(here)
        self.assertEqual((launch.errors, launch.args.model_path), ([], "deepseek-v2-tiny"))
        self.assertEqual(launch.model_config.architecture, "DeepseekV3ForCausalLM")
        errors = "\n".join(evaluate(ServerArgs(model_path="deepseek-v9-tiny"), CpuPlatform(), {}).errors)
        for name in (*EMBEDDED_MODELS, "deepseek-v9-tiny"):
            self.assertIn(name, errors)


if __name__ == "__main__":
    unittest.main()

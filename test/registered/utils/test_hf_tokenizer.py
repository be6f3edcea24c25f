"""The tokenizer wrapper against transformers' AutoTokenizer on the same folders."""

import json
import tempfile
import unittest
from pathlib import Path

from tokenizers import processors

from sglang.srt.utils.chat_messages import ChatTemplateError
from sglang.srt.utils.hf_tokenizer import Tokenizer, TokenizerError
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import (
    byte_level_tokenizer,
    sentencepiece_tokenizer,
    wordpiece_tokenizer,
    write_tokenizer,
)

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

TEXTS = [
    "",
    " ",
    "The quick brown fox",
    "  two  spaces\n\n\tand tabs ",
    "naïve 你好 😀👍🏽 \u200d e\u0301",
    "<s>special</s><|pad|> inside <tool call>text",
    "\x00\x7f\ufffd",
    "27+58=85 " * 40,
]
MESSAGES = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": "héllo 😀"},
    {"role": "assistant", "content": "  padded answer  ", "tool_calls": None},
    {"role": "user", "content": "again"},
]
TEMPLATES = {
    "plain": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}",
    "blocks": "{{ messages[0].content }}{%- for m in messages %}\n    {%- if m.role == 'system' %}{% continue %}"
    "{% endif %}\n"
    "    {{- '<' + m['role'] + '>' + (m['content'] | trim) }}\n{% endfor %}\n"
    "{% if add_generation_prompt %}\nGO\n{% endif %}",
    "json": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{% endfor %}{{ bos_token }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% if ns.n > 9 %}{% break %}{% endif %}{{ ns.n }}{{ m.get('missing', m.content) }}{% endfor %}",
    "kwargs": "{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}"
    "{{ tools }}{{ messages | map(attribute='content') | join('|') }}",
    "time": "{{ strftime_now('%Y') }}{{ messages }}",
}


def auto_tokenizer(folder: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


class TestAgainstTransformers(CustomTestCase):
    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())

    def test_encode_and_decode(self):
        builders = (byte_level_tokenizer, sentencepiece_tokenizer, wordpiece_tokenizer)
        for build in builders:
            with self.subTest(build.__name__):
                folder = write_tokenizer(f"{self.folder}/{build.__name__}", build())
                ours, theirs = Tokenizer.from_path(folder), auto_tokenizer(folder)
                self.assertEqual(ours.bos_token_id, theirs.bos_token_id)
                self.assertEqual(ours.eos_token_id, theirs.eos_token_id)
                for text in TEXTS:
                    for special in (True, False):
                        ids = ours.encode(text, add_special_tokens=special)
                        self.assertEqual(ids, theirs.encode(text, add_special_tokens=special), (text, special))
                        for skip in (True, False):
                            self.assertEqual(ours.decode(ids, skip), theirs.decode(ids, skip_special_tokens=skip), text)

    def test_added_tokens_of_the_config_alone(self):
        tokenizer = byte_level_tokenizer()
        extra = tokenizer.get_vocab_size()
        entry = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
        entry |= {"content": "<|late|>", "special": True}
        folder = write_tokenizer(self.folder, tokenizer, added_tokens_decoder={str(extra): entry})
        ours, theirs = Tokenizer.from_path(folder), auto_tokenizer(folder)
        self.assertEqual(ours.encode("a<|late|>b"), theirs.encode("a<|late|>b"))
        self.assertIn(extra, ours.all_special_ids)

    def test_chat_templates_render_alike(self):
        for name, template in TEMPLATES.items():
            with self.subTest(name):
                folder = write_tokenizer(f"{self.folder}/{name}", byte_level_tokenizer(), chat_template=template)
                ours, theirs = Tokenizer.from_path(folder), auto_tokenizer(folder)
                for prompt in (True, False):
                    expected = theirs.apply_chat_template(
                        MESSAGES, tokenize=False, add_generation_prompt=prompt, enable_thinking=prompt
                    )
                    got = ours.apply_chat_template(
                        MESSAGES, add_generation_prompt=prompt, variables={"enable_thinking": prompt}
                    )
                    self.assertEqual(got, expected)

    def test_continue_final_message(self):
        folder = write_tokenizer(self.folder, byte_level_tokenizer())
        ours, theirs = Tokenizer.from_path(folder), auto_tokenizer(folder)
        messages = [{"role": "user", "content": "Say it"}, {"role": "assistant", "content": "It is"}]
        expected = theirs.apply_chat_template(messages, tokenize=False, continue_final_message=True)
        self.assertEqual(ours.apply_chat_template(messages, continue_final_message=True), expected)


class TestTokenizer(CustomTestCase):
    def setUp(self):
        self.folder = self.enterContext(tempfile.TemporaryDirectory())

    def write(self, **config) -> Tokenizer:
        return Tokenizer.from_path(write_tokenizer(self.folder, byte_level_tokenizer(), **config))

    def test_token_bytes_join_to_the_decoded_text(self):
        ours = self.write()
        self.assertTrue(ours.is_byte_level)
        for text in TEXTS:
            ids = ours.encode(text)
            self.assertEqual(b"".join(map(ours.token_bytes, ids)).decode("utf-8", "replace"), ours.decode(ids, False))
        self.assertEqual(ours.token_bytes(10**6), b"")

    def test_add_bos_token_adds_one_bos_and_not_two(self):
        templated = self.write(add_bos_token=True)
        self.assertEqual(templated.encode("hi").count(templated.bos_token_id), 1)
        backend = byte_level_tokenizer()
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        bare = Tokenizer.from_path(write_tokenizer(f"{self.folder}/bare", backend, add_bos_token=True))
        self.assertEqual(bare.encode("hi")[0], bare.bos_token_id)
        self.assertEqual(bare.encode("hi", add_special_tokens=False), bare.encode("hi")[1:])
        without = Tokenizer.from_path(write_tokenizer(f"{self.folder}/without", backend, add_bos_token=False))
        self.assertNotIn(without.bos_token_id, without.encode("hi"))

    def test_places_of_the_template(self):
        template = "{{ messages[0].content }}!"
        named = [{"name": "default", "template": template}, {"name": "rag", "template": "x"}]
        hello = [{"role": "user", "content": "hello"}]
        self.assertEqual(self.write(chat_template=named).apply_chat_template(hello), "hello!")
        Path(self.folder, "chat_template.jinja").write_text("file:{{ messages[0].content }}")
        self.assertEqual(self.write().apply_chat_template(hello), "file:hello")
        other = Path(self.folder, "other.json")
        other.write_text(json.dumps({"chat_template": "other:{{ messages[0].content }}"}))
        chosen = Tokenizer.from_path(self.folder, chat_template=str(other))
        self.assertEqual(chosen.apply_chat_template(hello), "other:hello")
        with self.assertRaisesRegex(ChatTemplateError, "no such file"):
            Tokenizer.from_path(self.folder, chat_template="chatml")
        for text, reason in (("{", "other.json is not valid JSON"), ("[]", "must hold a JSON object")):
            other.write_text(text)
            with self.assertRaisesRegex(ChatTemplateError, reason):
                Tokenizer.from_path(self.folder, chat_template=str(other))
            Path(self.folder, "chat_template.jinja").unlink(missing_ok=True)
            Path(self.folder, "chat_template.json").write_text(text)
            with self.assertRaisesRegex(ChatTemplateError, reason.replace("other", "chat_template")):
                self.write()

    def test_template_errors_are_ours(self):
        hello = [{"role": "user", "content": "hello"}]
        raising = self.write(chat_template="{{ raise_exception('roles must alternate') }}")
        with self.assertRaisesRegex(ChatTemplateError, "roles must alternate"):
            raising.apply_chat_template(hello)
        with self.assertRaisesRegex(ChatTemplateError, "unsafe|refused"):
            self.write(chat_template="{{ messages.__class__.__mro__ }}").apply_chat_template(hello)
        with self.assertRaisesRegex(ChatTemplateError, "refused"):
            self.write(chat_template="{{ messages.append(1) }}").apply_chat_template(hello)
        with self.assertRaisesRegex(ChatTemplateError, "syntax error in line 2"):
            self.write(chat_template="\n{% for %}")
        with self.assertRaisesRegex(ChatTemplateError, "--chat-template"):
            self.write(chat_template=None).apply_chat_template(hello)
        with self.assertRaisesRegex(ChatTemplateError, r"leaves messages\[0\].content"):
            self.write(chat_template="x").apply_chat_template(hello, continue_final_message=True)

    def test_unreadable_folders(self):
        with self.assertRaisesRegex(TokenizerError, "--tokenizer-path"):
            Tokenizer.from_path(self.folder)
        Path(self.folder, "tokenizer.json").write_text("{")
        with self.assertRaisesRegex(TokenizerError, "cannot be read"):
            Tokenizer.from_path(self.folder)
        entry = {"content": "<|late|>", "special": True}
        with self.assertRaisesRegex(TokenizerError, "do not belong together"):
            self.write(added_tokens_decoder={"9000": entry})


if __name__ == "__main__":
    unittest.main()

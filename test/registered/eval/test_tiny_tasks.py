"""The tiny tasks and the checkpoints trained on them: the split, the answers, and what each embedded folder holds."""

import hashlib
import itertools
import json
import random
import re
import unittest

import jinja2
from safetensors import safe_open
from tokenizers import Tokenizer

from sglang.embedded_models import EMBEDDED_MODELS, TOOLS_MODEL, default_model_path
from sglang.test import tiny_tasks
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import TASKS, far_lookups, heldout_questions, is_heldout, training_questions

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

MAX_FOLDER_BYTES = 5_000_000
# What folders keep in more than 16 bits, by the end of its name.
FULL_PRECISION = r"e_score_correction_bias|A_log"
FULL_PRECISION_V4 = r"hc_\w+|attn_sink|ape|gate\.bias|\w*norm\.weight|tid2eid"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
BOS, EOS, USER, ASSISTANT = 256, 257, 260, 261
V4_LAYERS = ("sliding", "compressed_sparse", "heavily_compressed", "compressed_sparse", "sliding")


class TestQuestions(CustomTestCase):
    def test_the_answers_written_out(self):
        for text, task, expected in (
            ("27+58=", "addition", "85"),
            ("0+0=", "addition", "0"),
            ("99+99=", "addition", "198"),
            ("rev:abcd=", "reverse", "dcba"),
            ("rev:aab=", "reverse", "baa"),
            ("sort:3142=", "sort", "1234"),
            ("sort:909090=", "sort", "000999"),
            ("a=3,c=7;c?", "lookup", "7"),
            ("z=0,y=1,x=2,w=0;w?", "lookup", "0"),
        ):
            with self.subTest(text=text):
                self.assertEqual((tiny_tasks.task_of(text), tiny_tasks.answer(text)), (task, expected))

    def test_what_is_no_question_is_refused(self):
        malformed = ["", "27+58", "100+1=", "rev:ab=", "rev:abcdefg=", "rev:ABC=", "sort:12=", " 27+58="]
        for text in [*malformed, "a=3;a?", "a=3,a=4;a?", "a=3,c=7;b?", "27+58=85"]:
            with self.subTest(text=text), self.assertRaisesRegex(ValueError, "not a question"):
                tiny_tasks.answer(text)
        with self.assertRaisesRegex(ValueError, "unknown task 'poetry'"):
            tiny_tasks.sample_question("poetry", random.Random(0))

    def test_no_answer_is_longer_than_what_an_evaluation_generates(self):
        for task in TASKS:
            for question in itertools.islice(training_questions(task, 1), 500):
                self.assertEqual(question.task, task)
                self.assertLess(len(question.answer), tiny_tasks.MAX_NEW_TOKENS)


class TestFarLookups(CustomTestCase):
    def test_the_pair_stands_as_far_back_as_asked(self):
        for nearest, farthest in ((20, 20), (300, 700), (2000, 2000)):
            questions = far_lookups(20, 0, (nearest, farthest))
            self.assertEqual(len({question.text for question in questions}), 20)
            for question in questions:
                self.assertTrue(is_heldout(question.text))
                key = question.text[-2]
                back = len(question.text) - question.text.index(f"{key}=")
                self.assertTrue(nearest <= back <= farthest, question.text)
                self.assertEqual(question.answer, question.text[question.text.index(f"{key}=") + 2])
                self.assertEqual(tiny_tasks.task_of(question.text), tiny_tasks.FAR_LOOKUP)

    def test_the_same_questions_for_the_same_arguments(self):
        self.assertEqual(far_lookups(3), far_lookups(5)[:3])
        self.assertNotEqual(far_lookups(3), far_lookups(3, seed=1))
        self.assertEqual(far_lookups(0), [])

    def test_distances_that_hold_no_question_are_refused(self):
        for n, distances in ((-1, (300, 700)), (1, (19, 700)), (1, (700, 300))):
            with self.subTest(n=n, distances=distances), self.assertRaisesRegex(ValueError, "lookups"):
                far_lookups(n, 0, distances)


class TestSplit(CustomTestCase):
    def test_training_never_meets_a_heldout_question(self):
        heldout = {question.text for question in heldout_questions(2000)}
        for task in TASKS:
            trained = {question.text for question in itertools.islice(training_questions(task, 0), 20_000)}
            self.assertFalse(trained & heldout)
            self.assertFalse([text for text in trained if is_heldout(text)])

    def test_heldout_questions_are_heldout_distinct_and_balanced(self):
        questions = heldout_questions(1001)
        self.assertTrue(all(is_heldout(question.text) for question in questions))
        self.assertEqual(len({question.text for question in questions}), 1001)
        counts = [sum(question.task == task for question in questions) for task in TASKS]
        self.assertEqual(counts, [251, 250, 250, 250])

    def test_the_same_questions_for_the_same_seed(self):
        self.assertEqual(heldout_questions(100), heldout_questions(500)[:100])
        self.assertNotEqual(heldout_questions(100), heldout_questions(100, seed=1))
        self.assertEqual(heldout_questions(0), [])

    def test_the_split_is_the_one_that_the_checkpoints_were_trained_with(self):
        # Another split would put trained questions among the held-out ones: retrain before changing these numbers.
        self.assertEqual(sum(is_heldout(question.text) for question in tiny_tasks.all_additions()), 1041)
        listing = "\n".join(question.text for question in heldout_questions(500))
        self.assertEqual(hashlib.sha256(listing.encode()).hexdigest()[:16], "fee4b124008244d1")

    def test_more_than_there_are_is_refused(self):
        with self.assertRaisesRegex(ValueError, "there are 1041; ask for fewer"):
            heldout_questions(4 * 1041 + 1)
        with self.assertRaisesRegex(ValueError, ">= 0"):
            heldout_questions(-1)


class TestEmbeddedFolders(CustomTestCase):
    def test_each_folder_holds_a_small_safetensors_checkpoint(self):
        self.assertEqual(default_model_path().name, "deepseek-v3-tiny")
        for name, folder in EMBEDDED_MODELS.items():
            with self.subTest(model=name):
                self.assertEqual({path.name for path in folder.iterdir()}, FILES)
                self.assertLessEqual(sum(path.stat().st_size for path in folder.iterdir()), MAX_FOLDER_BYTES)
                with safe_open(folder / "model.safetensors", "pt") as weights:
                    dtypes = {key: weights.get_slice(key).get_dtype() for key in weights.keys()}
                wide = {key for key, dtype in dtypes.items() if dtype != "BF16"}
                allowed = FULL_PRECISION_V4 if name == "deepseek-v4-tiny" else FULL_PRECISION
                self.assertEqual({key for key in wide if not re.search(rf"\.({allowed})$", key)}, set())
                self.assertLessEqual(set(dtypes.values()), {"BF16", "F32", "I64"})

    def test_the_shapes_are_those_of_their_families(self):
        expected = {
            "deepseek-v3-tiny": {
                "architectures": ["DeepseekV3ForCausalLM"],
                "topk_method": "noaux_tc",
                "scoring_func": "sigmoid",
                "routed_scaling_factor": 2.5,
                "norm_topk_prob": True,
                "first_k_dense_replace": 1,
                "n_shared_experts": 1,
                "num_nextn_predict_layers": 1,
            },
            "deepseek-v2-tiny": {
                "architectures": ["DeepseekV2ForCausalLM"],
                "topk_method": "greedy",
                "scoring_func": "softmax",
                "q_lora_rank": None,
                "norm_topk_prob": False,
                "n_shared_experts": 2,
            },
            "qwen3.5-moe-tiny": {
                "architectures": ["Qwen3_5MoeForCausalLM"],
                "model_type": "qwen3_5_moe_text",
                "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
                "attn_output_gate": True,
                "mtp_num_hidden_layers": 1,
            },
            "deepseek-v4-tiny": {
                "architectures": ["DeepseekV4ForCausalLM"],
                "layer_types": [f"{kind}_attention" for kind in V4_LAYERS],
                "mlp_layer_types": ["hash_moe"] + ["moe"] * 4,
                "sliding_window": 128,
                "hc_mult": 4,
                "num_nextn_predict_layers": 1,
            },
        }
        expected[TOOLS_MODEL] = {**expected["deepseek-v3-tiny"], "num_nextn_predict_layers": 0}
        configs = {name: json.loads((folder / "config.json").read_text()) for name, folder in EMBEDDED_MODELS.items()}
        self.assertEqual(configs.keys(), expected.keys())
        for name, wanted in expected.items():
            with self.subTest(model=name):
                self.assertEqual({key: configs[name][key] for key in wanted}, wanted)
                self.assertEqual((configs[name]["vocab_size"], configs[name]["eos_token_id"]), (288, EOS))
        self.assertGreater(configs["deepseek-v3-tiny"]["n_group"], configs["deepseek-v3-tiny"]["topk_group"])
        self.assertEqual(configs["deepseek-v3-tiny"]["rope_parameters"]["rope_type"], "yarn")
        # A prompt of 700 tokens has more entries than the indexer chooses; with fewer heads its scores would tie.
        self.assertLess(configs["deepseek-v4-tiny"]["index_topk"], 700 // 4)
        self.assertGreaterEqual(configs["deepseek-v4-tiny"]["index_n_heads"], 32)

    def test_the_router_bias_of_the_v3_shape_was_trained(self):
        with safe_open(EMBEDDED_MODELS["deepseek-v3-tiny"] / "model.safetensors", "pt") as weights:
            biases = [weights.get_tensor(key) for key in weights.keys() if key.endswith("e_score_correction_bias")]
        self.assertEqual(len(biases), 4)
        for bias in biases:
            self.assertGreater(bias.std().item(), 1e-3)


class TestTokenizer(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        # The model with tools has more tokens and a template of its own: test_train_tool_model.py.
        cls.folders = {name: folder for name, folder in EMBEDDED_MODELS.items() if name != TOOLS_MODEL}
        cls.tokenizers = {
            name: Tokenizer.from_file(str(folder / "tokenizer.json")) for name, folder in cls.folders.items()
        }

    def test_text_becomes_its_bytes_and_comes_back(self):
        text = "".join(map(chr, range(256))) + " 27+58=\r\n\t  \u00e9\u4f60\u597d \U0001f600\u0000end "
        for name, tokenizer in self.tokenizers.items():
            with self.subTest(model=name):
                ids = tokenizer.encode(text).ids
                self.assertEqual(ids, list(text.encode("utf-8")))
                self.assertEqual(tokenizer.decode(ids), text)

    def test_any_bytes_decode_as_utf8_with_replacement(self):
        rng = random.Random(0)
        sequences = [list(range(256)), [0xF0, 0x9F, 0x98], [0xFF]]
        sequences += [[rng.randrange(256) for _ in range(50)] for _ in range(50)]
        for ids in sequences:
            for tokenizer in self.tokenizers.values():
                self.assertEqual(tokenizer.decode(ids), bytes(ids).decode("utf-8", "replace"))

    def test_every_id_below_the_vocabulary_size_has_a_token(self):
        for tokenizer in self.tokenizers.values():
            self.assertEqual(tokenizer.get_vocab_size(), 288)
            self.assertEqual(tokenizer.decode(list(range(256, 288))), "")
            self.assertTrue(all(tokenizer.id_to_token(i) for i in range(288)))

    def test_the_chat_template_needs_only_jinja2(self):
        turns = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "27+58="},
            {"role": "assistant", "content": "85"},
            {"role": "user", "content": "1+1="},
        ]
        for name, folder in self.folders.items():
            with self.subTest(model=name):
                settings = json.loads((folder / "tokenizer_config.json").read_text())
                template = jinja2.Environment().from_string(settings["chat_template"])
                tokens = {"bos_token": settings["bos_token"], "eos_token": settings["eos_token"]}
                prompt = template.render(messages=turns[1:2], add_generation_prompt=True, **tokens)
                self.assertEqual(prompt, "<|bos|><|user|>27+58=<|assistant|>")
                ids = self.tokenizers[name].encode(prompt).ids
                self.assertEqual(ids, [BOS, USER, *b"27+58=", ASSISTANT])
                whole = template.render(messages=turns, add_generation_prompt=False, **tokens)
                self.assertEqual(whole, "<|bos|><|system|>Be brief.<|user|>27+58=<|assistant|>85<|eos|><|user|>1+1=")
                with self.assertRaises(jinja2.exceptions.UndefinedError):
                    template.render(messages=[{"role": "tool", "content": "x"}], **tokens)

    def test_transformers_reads_the_same_ids(self):
        from transformers import AutoTokenizer

        text = "  27+58=\u00e9\n\nabc  123 <|eos|>"
        for name, folder in self.folders.items():
            with self.subTest(model=name):
                tokenizer = AutoTokenizer.from_pretrained(folder)
                ids = self.tokenizers[name].encode(text).ids
                self.assertEqual(tokenizer(text).input_ids, ids)
                self.assertEqual(tokenizer.decode(ids), text)
                self.assertEqual((tokenizer.bos_token_id, tokenizer.eos_token_id), (BOS, EOS))
                messages = [{"role": "user", "content": "1+1="}]
                rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
                self.assertEqual(rendered, "<|bos|><|user|>1+1=<|assistant|>")


if __name__ == "__main__":
    unittest.main()

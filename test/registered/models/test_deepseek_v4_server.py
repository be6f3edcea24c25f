"""DeepSeek V4 over HTTP and offline, with and without drafts: the same tokens, and prefix hits."""

import tempfile
import unittest

import httpx
import torch

from sglang.srt.entrypoints.engine import Engine
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, free_url, kill_process_tree, popen_launch_server
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer
from sglang.test.v4_mtp_reference import save_tiny_v4_mtp

register_cpu_ci(est_time=40, suite="stage-b-test-cpu")

PARAMS = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
SIZES = {"max_total_tokens": 4096, "context_length": 1024, "random_seed": 1}


class TestServer(CustomTestCase):
    def test_offline_and_over_http(self):
        folder = self.enterContext(tempfile.TemporaryDirectory())
        model, _ = save_tiny_v4_mtp(folder)
        write_tokenizer(folder, byte_level_tokenizer())
        ids = torch.randint(3, 400, (540,), generator=torch.Generator().manual_seed(5)).tolist()
        truth = model.generate(
            torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        wanted = truth[0, 540:].tolist()
        with Engine(model_path=folder, speculative_algorithm="NEXTN", **SIZES) as engine:
            offline = [engine.generate(input_ids=ids, sampling_params=PARAMS) for _ in range(2)]
        flags = [part for name, size in SIZES.items() for part in (f"--{name.replace('_', '-')}", str(size))]
        url = free_url()
        process = popen_launch_server(folder, url, other_args=flags)
        self.addCleanup(kill_process_tree, process.pid)
        body = {"input_ids": ids, "sampling_params": PARAMS}
        served = [httpx.post(f"{url}/generate", json=body, timeout=120).json() for _ in range(2)]
        for replies in (offline, served):
            self.assertEqual([reply["output_ids"] for reply in replies], [wanted, wanted])
            self.assertEqual([reply["meta_info"]["cached_tokens"] for reply in replies], [0, 512])
        question = {"model": folder, "prompt": "hello", "max_tokens": 4}
        text = httpx.post(f"{url}/v1/completions", json=question, timeout=120)
        self.assertEqual(text.status_code, 200, text.text)
        info = httpx.get(f"{url}/server_info", timeout=60).json()
        self.assertEqual((info["page_size"], info["attention_backend"]), (256, "dsv4"))
        state = info["internal_states"][0]
        self.assertEqual((state["num_used_swa_tokens"], state["swa_max_total_num_tokens"]), (0, 4096))
        self.assertTrue(any("window: 4096 tokens (1 of KV)" in line for line in state["memory_plan"]))


if __name__ == "__main__":
    unittest.main()

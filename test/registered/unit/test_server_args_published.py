"""Command lines as published for MI300X and MI355X: each is accepted, or refused for exactly the reasons given.

The lines come from upstream's documentation and pull requests, AMD's blogs and the InferenceX recipes; MODEL stands for
the model, here a folder that holds only a config.json of the released shape.
"""

import json
import shlex
import tempfile
import unittest
from pathlib import Path
from types import SimpleNamespace

from sglang.srt.arg_groups.parse import read
from sglang.srt.arg_groups.plan import evaluate
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.mxfp4_checkpoints import quark_config
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")

MI300X = SimpleNamespace(kind="hip", device_type="cuda", supports_graphs=True)

DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "vocab_size": 129280, "rms_norm_eps": 1e-6, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "norm_topk_prob": True, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "q_lora_rank": 1536,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "max_position_embeddings": 163840, "rope_theta": 10000, "torch_dtype": "bfloat16", "eos_token_id": 1,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32,
                     "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
}  # fmt: skip
DEEPSEEK_V2_LITE = {
    **DEEPSEEK_V3, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
    "num_hidden_layers": 27, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_attention_heads": 16,
    "vocab_size": 102400, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "first_k_dense_replace": 1, "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy",
    "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0, "q_lora_rank": None,
}  # fmt: skip
QWEN35_397B = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
    "text_config": {
        "model_type": "qwen3_5_moe_text", "hidden_size": 4096, "num_hidden_layers": 60, "num_attention_heads": 32,
        "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248320, "rms_norm_eps": 1e-6, "dtype": "bfloat16",
        "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 64, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024,
        "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144, "eos_token_id": 248044,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    },
}  # fmt: skip
QUARK = {"quantization_config": quark_config(["lm_head", "re:.*self_attn.*", "re:.*linear_attn.*", "*.mlp.gate"])}
AWQ = {"quantization_config": {"quant_method": "awq"}}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
MODELS = {
    "v3": DEEPSEEK_V3,
    "v3-fp8": {**DEEPSEEK_V3, **FP8},
    "v3-quark": {**DEEPSEEK_V3, "num_nextn_predict_layers": 1, **QUARK},
    "v3-awq": {**DEEPSEEK_V3, **AWQ},
    "v2-lite": DEEPSEEK_V2_LITE,
    "qwen3.5": QWEN35_397B,
    "qwen3.5-fp8": {**QWEN35_397B, **FP8},
    "qwen3.5-quark": {**QWEN35_397B, **QUARK},
}

QUANTISED = "such checkpoints are not supported"
DISAGGREGATION = "refused: prefill and decode run in one server"

# name, exports, command line, beginnings or parts of every reason in order (none: accepted)
PUBLISHED = (
    ("upstream docs, Qwen3.5 on AMD", "SGLANG_USE_AITER=1", "--model-path MODEL[qwen3.5] --tp 8 "
     "--attention-backend triton --trust-remote-code", []),
    ("InferenceX, Qwen3.5 bf16 MI300X", "", "--attention-backend triton --model-path MODEL[qwen3.5] --host=0.0.0.0 "
     "--port 8888 --tensor-parallel-size 8 --trust-remote-code --mem-fraction-static 0.8", []),
    ("InferenceX, Qwen3.5 bf16 MI355X", "", "--attention-backend triton --model-path MODEL[qwen3.5] --host=0.0.0.0 "
     "--port 8888 --tensor-parallel-size 8 --ep-size 1 --data-parallel-size 1 --trust-remote-code "
     "--tokenizer-worker-num 6 --enable-aiter-allreduce-fusion --cuda-graph-max-bs 64 --context-length 9236 "
     "--disable-radix-cache --max-prefill-tokens 32768 --scheduler-recv-interval 30 --mem-fraction-static 0.8", []),
    ("InferenceX, Qwen3.5 fp8 MI300X", "", "--attention-backend triton --model-path MODEL[qwen3.5-fp8] "
     "--host=0.0.0.0 --port 8888 --tensor-parallel-size 8 --trust-remote-code --mem-fraction-static 0.8", []),
    ("a pull request on AITER, Qwen3.5 MXFP4 MI355X",
     "AITER_FLYDSL_FORCE=1 SGLANG_USE_AITER_UNIFIED_ATTN=1 SGLANG_USE_AITER=1",
     "--model-path MODEL[qwen3.5-quark] --tp 2 --attention-backend aiter --trust-remote-code "
     "--chunked-prefill-size 32768 --model-loader-extra-config '{\"enable_multithread_load\": true}' "
     "--watchdog-timeout 1200 --mem-fraction-static 0.9 --host 0.0.0.0 --port 9000 --disable-radix-cache "
     "--enable-aiter-allreduce-fusion --max-running-requests 512 --page-size 16", []),
    ("upstream docs, DeepSeek-V3 on AMD", "", "--model-path deepseek-ai/DeepSeek-V3 --tp 8 --trust-remote-code",
     ["model: unknown model path 'deepseek-ai/DeepSeek-V3'"]),
    ("upstream docs, DeepSeek-V3 converted to bf16", "", "--model MODEL[v3] --tp 8 --trust-remote-code "
     "--host 0.0.0.0 --port 30000", []),
    ("AMD blog, DeepSeek-R1 MI300X", "RCCL_MSCCL_ENABLE=0 CK_BLOCK_GEMM=1 SGLANG_USE_AITER=1 DEBUG_HIP_BLOCK_SYNC=1024 "
     "GPU_FORCE_BLIT_COPY_SIZE=64", "--model MODEL[v3-fp8] --tp 8 --trust-remote-code --chunked-prefill-size 131072 "
     "--enable-torch-compile --torch-compile-max-bs 256", []),
    ("InferenceX, DeepSeek-R1 fp8 MI300X", "SGLANG_USE_AITER=1 SGLANG_AITER_MLA_PERSIST=1 HSA_NO_SCRATCH_RECLAIM=1",
     "--model-path=MODEL[v3-fp8] --host=0.0.0.0 --port=8888 --trust-remote-code --tensor-parallel-size=8 "
     "--mem-fraction-static=0.8 --cuda-graph-max-bs=128 --chunked-prefill-size=131072 --num-continuous-decode-steps=4 "
     "--max-prefill-tokens=131072 --kv-cache-dtype fp8_e4m3 --attention-backend aiter --disable-radix-cache", []),
    ("InferenceX, DeepSeek-R1 fp8 MI355X", "SGLANG_USE_AITER=1 RCCL_MSCCL_ENABLE=0 ROCM_QUICK_REDUCE_QUANTIZATION=INT4",
     "--attention-backend aiter --model-path MODEL[v3-fp8] --host=0.0.0.0 --port 8888 --tensor-parallel-size 8 "
     "--trust-remote-code --chunked-prefill-size 196608 --mem-fraction-static 0.8 --disable-radix-cache "
     "--num-continuous-decode-steps 4 --max-prefill-tokens 196608 --kv-cache-dtype fp8_e4m3 --cuda-graph-max-bs 64",
     []),
    ("DeepSeek-R1 MXFP4 with MTP, MI355X", "SGLANG_AITER_FP8_PREFILL_ATTN=1",
     "--model-path MODEL[v3-quark] --tensor-parallel-size 8 --trust-remote-code --chunked-prefill-size 131072 "
     "--host 0.0.0.0 --port 9000 --log-requests --mem-fraction-static 0.8 --max-running-requests 64 "
     "--kv-cache-dtype fp8_e4m3 --attention-backend aiter --speculative-algorithm EAGLE --speculative-num-steps 3 "
     "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4",
     ["SGLANG_AITER_FP8_PREFILL_ATTN='1' would change results"]),
    ("DeepSeek-V3 in another format", "", "--model-path MODEL[v3-awq] --tp 8", [f"model: * (awq): {QUANTISED}"]),
    ("upstream pull request 11150, MORI",
     "SGLANG_USE_AITER=1 SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK=256",
     "--tool-call-parser deepseekv3 --trust-remote-code --model-path MODEL[v3] --attention-backend aiter "
     "--disable-radix-cache --disable-cuda-graph --tp-size 8 --ep-size 8 --skip-server-warmup --moe-a2a-backend mori "
     "--moriep-mode low_latency --enable-dp-attention --dp-size 8 --enable-dp-lm-head",
     ["unknown flag --moriep-mode: did you mean --deepep-mode?"]),
    ("Qwen3.5 prefill node over MORI", "SGLANG_USE_AITER=1 NCCL_IB_TC=104 NCCL_CROSS_NIC=0",
     "--model-path MODEL[qwen3.5] --disaggregation-mode prefill --disaggregation-ib-device ionic_0,ionic_1 "
     "--host 10.2.224.9 --port 30002 --trust-remote-code --tp-size 8 --decode-log-interval 1 --watchdog-timeout 3600 "
     "--load-balance-method round_robin --attention-backend triton --disaggregation-transfer-backend mori "
     "--mem-fraction-static 0.7 --max-running-requests 24 --chunked-prefill-size 1024 --cuda-graph-bs 1 2 3 "
     "--disable-radix-cache",
     [f"--disaggregation-mode prefill, *--disaggregation-transfer-backend mori are {DISAGGREGATION}"]),
    ("upstream pull request 22329", "SGLANG_ROCM_USE_MULTI_STREAM=1 GPU_MAX_HW_QUEUES=5 SGLANG_USE_AITER=1",
     "--model-path MODEL[v3] --tp 8 --trust-remote-code --disable-shared-experts-fusion --deepep-mode low_latency "
     "--mem-fraction-static 0.9 --chunked-prefill-size 131072 --host 0.0.0.0",
     ["--deepep-mode low_latency needs --moe-a2a-backend mori"]),
    ("upstream pull request 25885, Qwen3.5 second stream", "SGLANG_ALT_STREAM=1 SGLANG_USE_AITER=1",
     "--model-path MODEL[qwen3.5] --tp 8 --disable-shared-experts-fusion --attention-backend aiter "
     "--disable-radix-cache --reasoning-parser qwen3 --tool-call-parser qwen3_coder",
     []),
    ("DeepSeek-V2-Lite, one node", "SGLANG_USE_AITER=1 HSA_NO_SCRATCH_RECLAIM=1", "--model-path MODEL[v2-lite] --tp 4 "
     "--host 0.0.0.0 --trust-remote-code --disable-cuda-graph --attention-backend triton", []),
    ("two nodes", "NCCL_IB_HCA=mlx5_0", "--model-path MODEL[v3] --tp 16 --nnodes 2 --node-rank 1 "
     "--dist-init-addr 10.0.0.1:5000 --trust-remote-code",
     ["--nnodes 2 and --node-rank 1 are refused: several nodes are not implemented"]),
)  # fmt: skip


class TestPublishedCommandLines(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls._folders = cls.enterClassContext(tempfile.TemporaryDirectory())
        for name, config in MODELS.items():
            folder = Path(cls._folders) / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(config))

    def plan(self, exports, line, platform=MI300X):
        for name in MODELS:
            line = line.replace(f"MODEL[{name}]", f"{self._folders}/{name}")
        environ = dict(word.split("=", 1) for word in shlex.split(exports))
        return evaluate(read(shlex.split(line)), platform=platform, environ=environ)

    def test_each_line(self):
        for name, exports, line, expected in PUBLISHED:
            with self.subTest(name):
                errors = self.plan(exports, line).errors
                self.assertEqual(len(errors), len(expected), errors)
                for error, pattern in zip(errors, expected):
                    position = 0
                    for part in pattern.split("*"):
                        position = error.find(part, position)
                        self.assertGreaterEqual(position, 0, f"{part!r} not in {error!r}")
                    self.assertTrue(error.startswith(pattern.split("*")[0]), error)

    def test_what_an_accepted_line_becomes(self):
        plan = self.plan(*PUBLISHED[2][1:3])
        args = plan.args
        self.assertEqual((args.tp_size, args.context_length, args.dtype, args.device), (8, 9236, "bfloat16", "cuda"))
        self.assertEqual((args.host, args.port, args.mem_fraction_static), ("0.0.0.0", 8888, 0.8))
        self.assertEqual((args.attention_backend, args.disable_cuda_graph), ("triton", False))
        said = "\n".join(plan.warnings)
        for part in ("--trust-remote-code has no effect: no remote code is ever run", "--enable-aiter-allreduce-fusion",
                     "--tokenizer-worker-num 6", "--scheduler-recv-interval 30", "without --api-key"):  # fmt: skip
            self.assertEqual(said.count(part), 1, part)

    def test_the_same_lines_on_a_cpu_name_the_backend(self):
        cpu = SimpleNamespace(kind="cpu", device_type="cpu", supports_graphs=False)
        errors = self.plan("", "--model-path MODEL[v3] --tp 8 --attention-backend aiter", cpu).errors
        self.assertEqual(errors, ["--attention-backend aiter needs platform hip, and this is cpu: use torch_native"])

    def test_a_bad_variable_stands_beside_a_bad_flag(self):
        plan = self.plan("SGLANG_USE_AITR=1", "--model-path MODEL[v3] --tpp 8")
        self.assertEqual(len(plan.errors), 2)
        self.assertIn("unknown flag --tpp: did you mean --tp?", plan.errors)
        self.assertIn("did you mean SGLANG_USE_AITER?", plan.errors[1])


if __name__ == "__main__":
    unittest.main()

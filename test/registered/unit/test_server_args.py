"""Settings: every problem at once, resolution, and what a user sees on a wrong command line."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from sglang.srt import server_args as module
from sglang.srt.arg_groups.checks import DISPATCH_LIMIT
from sglang.srt.arg_groups.parse import check, parse, read
from sglang.srt.arg_groups.plan import LaunchPlan, evaluate, resolve
from sglang.srt.arg_groups.resolve import STEPS
from sglang.srt.arg_groups.steps import Change, Context
from sglang.srt.arg_groups.upstream import upstream_flags
from sglang.srt.configs.qwen3_5 import Qwen3_5Config
from sglang.srt.environ import envs
from sglang.srt.server_args import (
    ServerArgs,
    ServerArgsError,
    get_global_server_args,
    override_server_args,
    set_global_server_args_for_scheduler,
)
from sglang.srt.utils.network import is_loopback
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.published_sizes import qwen35_like
from sglang.test.resolved_args import errors_of, resolved
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

ROOT = Path(__file__).resolve().parents[3]
CPU = SimpleNamespace(kind="cpu", device_type="cpu", supports_graphs=False)
CUDA = SimpleNamespace(kind="cuda", device_type="cuda", supports_graphs=True)
HIP = SimpleNamespace(kind="hip", device_type="cuda", supports_graphs=True)
TEXT = Qwen3_5Config.from_hf({
    **qwen35_like(4)["text_config"], "num_experts": 16, "num_attention_heads": 4, "moe_intermediate_size": 64,
    "num_key_value_heads": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "mamba_ssm_dtype": "bfloat16",
})  # fmt: skip
MODEL = SimpleNamespace(
    text=TEXT, dtype=torch.float32, context_len=4096, quant_config=None,
    shared_fusion_refusal=lambda backend: "" if backend == "none" else "tokens travel",
)  # fmt: skip

DRAFTS = {"speculative_algorithm": "NEXTN", "speculative_num_steps": 3, "speculative_draft_model_path": "/its/layer"}


class TestProblems(CustomTestCase):
    def test_all_at_once(self):
        errors = errors_of(
            "--tpp 3 --dtype int4 --port 99999 --max-running-requests zero --ep 3 --tp 2 stray "
            "--kv-cache-dtype fp8_e5m2 --speculative-algorithm EAGLE3 --speculative-num-steps 9 --context-length"
        )
        self.assertEqual(len(errors), 10, errors)
        for part in ("unknown flag --tpp: did you mean --tp?", "--dtype must be one of auto", "--port must be",
                     "--max-running-requests expects an integer, got 'zero'", "--ep-size 3", "'stray'",
                     "--speculative-algorithm", "--speculative-num-steps must be",
                     "--kv-cache-dtype",
                     "--context-length: expected one argument"):  # fmt: skip
            self.assertTrue(any(part in error for error in errors), part)

    def test_contradictions_name_both_flags_and_the_fix(self):
        cases = (
            ("--disable-shared-experts-fusion --enforce-shared-experts-fusion", "contradict: drop one"),
            ("--chunked-prefill-size 100 --page-size 16", "not a multiple of --page-size 16: use 96"),
            ("--chunked-prefill-size 8 --page-size 16", "not a multiple of --page-size 16: use 16"),
            ("--chunked-prefill-size -1 --enable-mixed-chunk", "--enable-mixed-chunk needs chunks"),
            ("--speculative-num-steps 3", "without --speculative-algorithm: add --speculative-algorithm NEXTN"),
            (
                "--speculative-algorithm EAGLE --speculative-eagle-topk 4",
                "requests a tree of draft tokens: use 1, a chain",
            ),
            (
                "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-num-draft-tokens 8",
                "must be --speculative-num-steps 3 + 1: use 4",
            ),
            ("--speculative-algorithm NEXTN --enable-mixed-chunk", "cannot be combined: drop one"),
            ("--max-total-tokens 8 --page-size 16", "less than one page: --page-size is 16"),
            ("--cuda-graph-bs 1 64 --cuda-graph-max-bs 32", "--cuda-graph-max-bs is 32: raise"),
            ("--served-model-name a:b", "without a colon"),
            ("--json-model-override-args [1]", "must be a JSON object"),
            ("--json-model-override-args {", "not valid JSON"),
            ("--api-key=", "must not be empty"),
            ("--tp 4 --dp 3 --enable-dp-attention", "--dp-size 3 does not divide --tp-size 4"),
            ("--tp 4 --ep 3", "--ep-size 3 does not divide --tp-size 4"),
            ("--tp 4 --ep 4 --deepep-mode low_latency", "low_latency needs --moe-a2a-backend mori"),
            ("--tp 4 --moe-a2a-backend mori --chunked-prefill-size -1", "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK"),
            ("--tp 4 --enable-two-batch-overlap", "--enable-two-batch-overlap is refused"),
        )
        for line, part in cases:
            with self.subTest(line):
                errors = errors_of(line)
                self.assertEqual([part in error for error in errors], [True], errors)

    def test_not_in_this_build(self):
        for line in ("--schedule-policy dfs-weight", "--attention-backend fa3", "--load-format gguf",
                     "--radix-eviction-policy lfu", "--quantization gptq", "--quantization w8a8_fp8",
                     "--kv-cache-dtype fp8_e5m2", "--moe-a2a-backend deepep",
                     "--load-balance-method total_requests",
                     "--sampling-backend flashinfer"):  # fmt: skip
            self.assertIn("is known from upstream but not implemented", errors_of(line)[0])

    def test_bounds(self):
        for line in ("--port 0", "--mem-fraction-static 1", "--mem-fraction-static 0", "--page-size 0", "--tp -1",
                     "--chunked-prefill-size 0", "--chunked-prefill-size -2", "--stream-interval 0", "--random-seed -1",
                     "--mem-fraction-static nan"):  # fmt: skip
            self.assertEqual(len(errors_of(line)), 1, line)
        self.assertIn("-1 or at least 1", errors_of("--chunked-prefill-size -2")[0])

    def test_constructed_arguments_are_checked_alike(self):
        bad = ServerArgs(tp_size="2", port=True, cuda_graph_bs=[1, "2"], dtype="int4", log_requests=1, host=None)
        self.assertEqual(len(check(bad)[0]), 6)
        self.assertEqual(check(ServerArgs(mem_fraction_static=0.5, watchdog_timeout=3))[0], [])
        own = ServerArgs(mem_fraction_static=np.float64(0.5), watchdog_timeout=np.float64(3), dtype=np.str_("float32"))
        self.assertEqual(check(own)[0], [])

    def test_flags_without_effect_are_said_once(self):
        with self.assertLogs("sglang.srt.arg_groups.parse", "WARNING") as logs:
            line = "--trust-remote-code --trust-remote-code --download-dir x --moe-runner-backend aiter"
            parse(line.split())
        text = "\n".join(logs.output)
        self.assertEqual(text.count("--trust-remote-code has no effect: no remote code is ever run"), 1)
        self.assertEqual(len(logs.output), 3)

    def test_harmless_values_of_refused_flags(self):
        line = "--pp-size 1 --disaggregation-mode null --nnodes 1 --model-impl sglang"
        self.assertEqual(errors_of(line), [])
        self.assertTrue(all(upstream_flags()[word].refused for word in line.split()[::2]))


class TestResolve(CustomTestCase):
    def test_nothing_the_engine_needs_stays_open(self):
        given = ServerArgs(model_path="/m")
        plan = LaunchPlan(given, MODEL)
        resolve(plan, CPU)
        args = plan.args
        optional = {"max_total_tokens", "nccl_port", "max_mamba_cache_size", "cuda_graph_bs", "cuda_graph_max_bs"}
        optional |= {"piecewise_cuda_graph_tokens", "piecewise_cuda_graph_max_tokens"}
        optional |= {"quantization", "revision", "swa_full_tokens_ratio"}
        optional |= {field.name for part in (module.HttpArgs, module.SpecArgs) for field in dataclasses.fields(part)}
        open_fields = {field.name for field in dataclasses.fields(args) if getattr(args, field.name) is None}
        self.assertEqual(open_fields - optional, set())
        self.assertEqual((args.tokenizer_path, args.served_model_name, args.dtype), ("/m", "/m", "float32"))
        self.assertEqual((args.page_size, args.context_length, args.mamba_ssm_dtype), (1, 4096, "bfloat16"))
        self.assertIn("page_size: None -> 1 (default)", "\n".join(map(str, plan.changes)))
        self.assertEqual(given, ServerArgs(model_path="/m"))
        self.assertEqual(resolved(args, MODEL, CPU), args)

    def test_steps_are_pure(self):
        args = ServerArgs(model_path="/m", random_seed=3, attention_backend="triton")
        context = Context(HIP, MODEL, "")
        before = dataclasses.asdict(args)
        for step in STEPS:
            first, second = list(step(args, context)), list(step(args, context))
            self.assertEqual(first, second, step.__name__)
            for change in first:
                if isinstance(change, Change):
                    self.assertEqual(getattr(args, change.field), change.old, step.__name__)
                    self.assertTrue(change.reason)
        self.assertEqual(dataclasses.asdict(args), before)

    def test_defaults_follow_the_platform_and_the_page(self):
        args = resolved(ServerArgs(page_size=48, random_seed=1), MODEL, CPU)
        self.assertEqual(args.chunked_prefill_size % 48, 0)
        self.assertEqual(resolved(ServerArgs(page_size=4096), MODEL, CPU).chunked_prefill_size, 4096)
        self.assertEqual(resolved(ServerArgs(), MODEL, CUDA).chunked_prefill_size, 8192)
        self.assertEqual(resolved(ServerArgs(chunked_prefill_size=-1), MODEL, CUDA).chunked_prefill_size, -1)

    def test_a_chat_template_that_is_not_there(self):
        errors = evaluate(ServerArgs(chat_template="/nowhere.jinja"), CPU, {}).errors
        self.assertEqual(errors, ["model: --chat-template '/nowhere.jinja': no such file"])
        self.assertEqual(evaluate(ServerArgs(chat_template="/x", skip_tokenizer_init=True), CPU, {}).errors, [])

    def test_remark_on_an_open_host(self):
        for admin, ending in ((None, "administrative endpoints are closed"), ("k", "may run inference")):
            plan = evaluate(ServerArgs(host="0.0.0.0", admin_api_key=admin), CPU, {})
            self.assertTrue(next(text for text in plan.warnings if "--api-key" in text).endswith(ending))

    def test_state_slots_bound_the_running_requests(self):
        text = dataclasses.replace(TEXT, layer_types=("full_attention",) * 4)
        plain = SimpleNamespace(**{**vars(MODEL), "text": text})
        self.assertEqual(resolved(ServerArgs(max_mamba_cache_size=16), MODEL, CUDA).max_running_requests, 16)
        self.assertEqual(resolved(ServerArgs(max_mamba_cache_size=900), MODEL, CUDA).max_running_requests, 256)
        with self.assertRaisesRegex(ServerArgsError, "16 is below --max-running-requests 17"):
            resolved(ServerArgs(max_mamba_cache_size=16, max_running_requests=17), MODEL, CUDA)
        with self.assertRaisesRegex(ServerArgsError, "no recurrent states: drop it"):
            resolved(ServerArgs(max_mamba_cache_size=16), plain, CUDA)

    def test_the_ranks_do_not_meet_at_the_servers_port(self):
        for meets, refused in (("9", True), ("8", False), ("8 --dp 2", True)):
            errors = errors_of(f"--port 9 --nccl-port {meets}")
            self.assertEqual(["that of the ranks" in error for error in errors], [True] * refused, meets)

    def test_automatic_chunk_keeps_to_the_prefill_limit(self):
        args = resolved(ServerArgs(max_prefill_tokens=1000, page_size=16), MODEL, CUDA)
        self.assertEqual(args.chunked_prefill_size, 992)
        given = resolved(ServerArgs(max_prefill_tokens=1000, chunked_prefill_size=4096), MODEL, CUDA)
        self.assertEqual(given.chunked_prefill_size, 4096)

    def test_backends_by_platform(self):
        for backend, accepted in (("torch_native", (CPU, CUDA, HIP)), ("triton", (CUDA, HIP)), ("aiter", (HIP,))):
            for platform in (CPU, CUDA, HIP):
                with self.subTest(backend=backend, kind=platform.kind):
                    args = ServerArgs(attention_backend=backend)
                    if platform in accepted:
                        becomes = "triton" if backend == "aiter" else backend
                        self.assertEqual(resolved(args, MODEL, platform).attention_backend, becomes)
                    else:
                        with self.assertRaisesRegex(ServerArgsError, f"--attention-backend {backend} needs platform"):
                            resolved(args, MODEL, platform)

    def test_graphs_and_overlap_where_they_exist(self):
        def switches(platform, **fields):
            args = resolved(ServerArgs(**fields), MODEL, platform)
            return args.attention_backend, args.disable_cuda_graph, args.disable_overlap_schedule

        self.assertEqual(switches(CPU), ("torch_native", True, True))
        for platform in (CUDA, HIP):
            self.assertEqual(switches(platform), ("triton", False, False))
            self.assertEqual(switches(platform, attention_backend="torch_native"), ("torch_native", True, False))
            self.assertEqual(switches(platform, disable_overlap_schedule=True), ("triton", False, True))

    def test_tensor_parallel_size_that_does_not_fit_and_wrong_device(self):
        with self.assertRaises(ServerArgsError) as caught:
            resolved(ServerArgs(tp_size=4, device="cuda"), MODEL, CPU)
        self.assertEqual(len(caught.exception.errors), 2)
        self.assertIn("does not divide linear_num_key_heads 2, linear_num_value_heads 6", str(caught.exception))
        self.assertEqual(resolved(ServerArgs(tp_size=2), MODEL, CPU).tp_size, 2)
        with self.assertRaisesRegex(ServerArgsError, "set SGLANG_PLATFORM=cpu"):
            resolved(ServerArgs(device="cpu"), MODEL, HIP)

    def test_expert_parallelism(self):
        mori = {"tp_size": 2, "moe_a2a_backend": "mori"}
        args = resolved(ServerArgs(**mori), MODEL, CUDA)
        self.assertEqual((args.ep_size, args.deepep_mode), (2, "normal"))
        args = resolved(ServerArgs(**mori, deepep_mode="low_latency"), MODEL, CUDA)
        self.assertEqual(args.deepep_mode, "low_latency")
        args = resolved(ServerArgs(tp_size=2, ep_size=2), MODEL, CUDA)
        self.assertEqual((args.ep_size, args.deepep_mode, args.chunked_prefill_size), (2, "auto", 8192))
        with self.assertRaisesRegex(ServerArgsError, "--ep-size 3 does not divide the model's 16 experts"):
            resolved(ServerArgs(tp_size=3, ep_size=3), MODEL, CPU)
        with self.assertRaisesRegex(ServerArgsError, "has no experts: drop --ep-size 2"):
            dense = SimpleNamespace(**{**vars(MODEL), "text": dataclasses.replace(TEXT, num_experts=0)})
            resolved(ServerArgs(tp_size=2, ep_size=2), dense, CPU)

    def test_shared_experts_are_fused_where_they_can_be(self):
        refused = SimpleNamespace(**{**vars(MODEL), "shared_fusion_refusal": lambda backend: "96 wide"})
        self.assertFalse(resolved(ServerArgs(), MODEL, CPU).disable_shared_experts_fusion)
        plan = LaunchPlan(ServerArgs(), refused)
        resolve(plan, CPU)
        self.assertTrue(plan.args.disable_shared_experts_fusion)
        self.assertIn("disable_shared_experts_fusion: False -> True (96 wide)", list(map(str, plan.changes)))
        enforced = ServerArgs(enforce_shared_experts_fusion=True)
        self.assertFalse(resolved(enforced, MODEL, CPU).disable_shared_experts_fusion)
        with self.assertRaisesRegex(ServerArgsError, "--enforce-shared-experts-fusion cannot be served: 96 wide"):
            resolved(enforced, refused, CPU)
        with self.assertRaisesRegex(ServerArgsError, "--enforce-shared-experts-fusion cannot be served: tokens travel"):
            resolved(dataclasses.replace(enforced, tp_size=2, moe_a2a_backend="mori"), MODEL, CPU)

    def test_attention_groups_divide_the_chunk_and_the_heads(self):
        groups = {"dp_size": 2, "enable_dp_attention": True}
        args = resolved(ServerArgs(tp_size=4, page_size=48, ep_size=4, **groups), MODEL, CPU)
        self.assertEqual((args.chunked_prefill_size, args.num_replicas, args.attn_dp_size), (1008, 1, 2))
        with self.assertRaisesRegex(ServerArgsError, "8 in 2 attention groups does not divide linear_num_key_heads 2"):
            resolved(ServerArgs(tp_size=8, **groups), MODEL, CPU)
        args = resolved(ServerArgs(dp_size=2, load_balance_method="total_tokens"), MODEL, CPU)
        self.assertEqual((args.chunked_prefill_size, args.num_replicas, args.attn_dp_size), (2048, 2, 1))
        self.assertEqual(args.load_balance_method, "total_tokens")
        self.assertFalse(resolved(ServerArgs(tp_size=2, enable_dp_attention=True), MODEL, CPU).enable_dp_attention)

    def test_no_forward_exceeds_the_dispatch_limit(self):
        def sizes(limit, **fields):
            with envs.SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK.override(limit):
                args = resolved(ServerArgs(tp_size=2, moe_a2a_backend="mori", **fields), MODEL, CUDA)
            return args.chunked_prefill_size, args.max_running_requests

        self.assertEqual(sizes(16384), (8192, 256))
        self.assertEqual(sizes(4096), (4096, 256))
        self.assertEqual(sizes(100, page_size=16), (96, 100))
        self.assertEqual(sizes(4096, dp_size=2, enable_dp_attention=True), (4096, 256))
        self.assertEqual(sizes(100, enable_mixed_chunk=True), (50, 50))
        self.assertEqual(sizes(100, enable_mixed_chunk=True, max_running_requests=30), (70, 30))
        self.assertEqual(sizes(100, **DRAFTS), (100, 25))
        self.assertEqual(sizes(100, max_running_requests=25, cuda_graph_bs=[25], **DRAFTS), (100, 25))
        with self.assertRaisesRegex(ServerArgsError, "--speculative-num-draft-tokens 4, the rows of one .* above .*=3"):
            sizes(3, **DRAFTS)
        name = "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK=100"
        for size, fields in (
            ("--chunked-prefill-size 101", {"chunked_prefill_size": 101}),
            ("--chunked-prefill-size 101 on each of 2 attention groups",
             {"chunked_prefill_size": 202, "dp_size": 2, "enable_dp_attention": True}),
            ("--chunked-prefill-size 80 next to 30 running requests",
             {"chunked_prefill_size": 80, "max_running_requests": 30, "enable_mixed_chunk": True}),
            ("--max-running-requests 101", {"max_running_requests": 101}),
            ("--cuda-graph-bs 128", {"cuda_graph_bs": [1, 128, 8]}),
            ("--cuda-graph-max-bs 128", {"cuda_graph_max_bs": 128}),
            ("--page-size 128", {"page_size": 128}),
            # Four rows of a request in each verify step.
            ("--max-running-requests 26, each with 4 rows in a verify step (--speculative-num-draft-tokens), 104",
             {"max_running_requests": 26, **DRAFTS}),
            ("--cuda-graph-bs 32, each with 4 rows", {"cuda_graph_bs": [1, 32, 8], **DRAFTS}),
            ("--cuda-graph-max-bs 26, each with 4 rows", {"cuda_graph_max_bs": 26, **DRAFTS}),
        ):  # fmt: skip
            with self.assertRaises(ServerArgsError) as caught:
                sizes(100, **fields)
            self.assertEqual(len(caught.exception.errors), 1, caught.exception.errors)
            self.assertTrue(caught.exception.errors[0].startswith(size), caught.exception.errors)
            self.assertIn(name, caught.exception.errors[0])

    def test_order_of_the_state_dtype(self):
        with envs.SGLANG_MAMBA_SSM_DTYPE.override("float16"):
            self.assertEqual(resolved(ServerArgs(), MODEL, CPU).mamba_ssm_dtype, "float16")
            self.assertEqual(resolved(ServerArgs(mamba_ssm_dtype="float32"), MODEL, CPU).mamba_ssm_dtype, "float32")

    def test_malformed_variable_is_one_reason(self):
        with unittest.mock.patch.dict(os.environ, {"SGLANG_MAMBA_SSM_DTYPE": "int3"}):
            errors = evaluate(read(["--model-path", "/nowhere"]), CPU).errors
        self.assertEqual(len(errors), 2)
        self.assertIn("SGLANG_MAMBA_SSM_DTYPE", errors[0])

    def test_lpm_without_a_prefix_cache(self):
        args = resolved(ServerArgs(schedule_policy="lpm", disable_radix_cache=True), MODEL, CPU)
        self.assertEqual(args.schedule_policy, "fcfs")

    def test_loopback(self):
        hosts = ("127.0.0.1", "127.1.2.3", "localhost", "::1", "0.0.0.0", "::", "10.0.0.1")
        self.assertEqual([is_loopback(host) for host in hosts], [True] * 4 + [False] * 3)


class TestObject(CustomTestCase):
    def test_frozen(self):
        args = parse("--tp 2 --cuda-graph-bs 1 2 --mem-fraction-static 0.25".split())
        with self.assertRaises(dataclasses.FrozenInstanceError):
            args.tp_size = 4

    def test_global_and_scoped_override(self):
        self.assertRaises(RuntimeError, get_global_server_args)
        set_global_server_args_for_scheduler(ServerArgs(tp_size=2))
        with self.assertRaises(ZeroDivisionError), override_server_args(page_size=4) as args:
            self.assertIs(get_global_server_args(), args)
            self.assertEqual((args.page_size, args.tp_size), (4, 2))
            raise ZeroDivisionError
        self.assertIsNone(get_global_server_args().page_size)

    def test_constructing_touches_no_disk(self):
        self.assertEqual(ServerArgs(model_path="/nowhere").model_path, "/nowhere")
        self.assertIn("unknown model path '/nowhere'", evaluate(ServerArgs(model_path="/nowhere"), CPU, {}).errors[0])

    def test_the_environment_given_is_the_one_resolved(self):
        environ = {"SGLANG_MAMBA_SSM_DTYPE": "float16", DISPATCH_LIMIT: "64"}
        line = ["--moe-a2a-backend", "mori", "--deepep-mode", "normal"]
        args = evaluate(read(line), CPU, environ).args
        self.assertEqual((args.mamba_ssm_dtype, args.max_running_requests), ("float16", 64))
        self.assertEqual(args.chunked_prefill_size, 64)

    def test_deepep_mode_names_both_dispatchers(self):
        text = next(spec.arg.help for spec in module.specs() if spec.name == "deepep_mode")
        self.assertIn("DeepEP", text)
        self.assertIn("MoriEP", text)

    def test_page_lists_every_flag(self):
        page = (ROOT / "docs/advanced_features/server_arguments.md").read_text(encoding="utf-8")
        names = [flag for spec in module.specs() for flag in spec.flags] + list(upstream_flags())
        self.assertEqual([name for name in names if f"`{name}`" not in page], [])


class TestAsAProgram(CustomTestCase):
    def program(self, code, **environ):
        path = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2]), **environ}
        return subprocess.run([sys.executable, "-c", code], env=path, capture_output=True, text=True, timeout=60)

    def test_importing_and_parsing_load_no_torch(self):
        code = (
            "import sys; from sglang.srt.arg_groups.parse import parse; "
            "parse(['--tp', '2']); print('torch' in sys.modules)"
        )
        done = self.program(code)
        self.assertEqual((done.stdout.strip(), done.stderr), ("False", ""))

    def test_exit_status_and_no_traceback(self):
        code = (
            "import sys; from sglang.launch_server import main; "
            "sys.argv[1:] = ['--dry-run', '--modle-path', 'x', '--ep', '2']; main()"
        )
        done = self.program(code, SGLANG_USE_AITR="1", SGLANG_PLATFORM="cpu")
        self.assertEqual(done.returncode, 2)
        self.assertNotIn("Traceback", done.stdout + done.stderr)
        for part in ("unknown flag --modle-path: did you mean --model-path?", "--ep-size 2 does not divide",
                     "did you mean SGLANG_USE_AITER?"):  # fmt: skip
            self.assertIn(part, done.stdout)

    def test_errors_on_stderr(self):
        code = "from sglang.srt.server_args import exit_with_errors; exit_with_errors(['one', 'two'])"
        done = self.program(code)
        self.assertEqual((done.returncode, done.stderr), (2, "error: one\nerror: two\n"))

    def test_dry_run_of_a_folder_with_a_config_alone(self):
        rope = {"rope_type": "default", "rope_theta": 1e4}
        config = {
            "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512, "rms_norm_eps": 1e-6,
            "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
            "max_position_embeddings": 1024, "rope_parameters": rope,
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            accepted, refused = (
                "\n".join(evaluate(read(["--model", folder, "--tp", *words]), CPU).lines())
                for words in (["2", "--host", "0.0.0.0"], ["3"])
            )
        self.assertTrue(refused.startswith("dry run: refused (1 reason)"), refused)
        self.assertTrue(accepted.startswith("dry run: accepted, platform cpu"), accepted)
        for part in ("context_length: None -> 1024", "contains no *.safetensors", "without --api-key"):
            self.assertIn(part, accepted)
        self.assertIn("error: --tp-size 3 does not divide num_attention_heads 4, intermediate_size 128", refused)


if __name__ == "__main__":
    unittest.main()

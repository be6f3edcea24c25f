"""The memory plan against really built models, pools and buffers, and against sums done by hand."""

import contextlib
import io
import json
import tempfile
import unittest
import unittest.mock
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sglang import plan as cli
from sglang.srt.arg_groups.parse import read
from sglang.srt.arg_groups.plan import evaluate, plan_launch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ParallelState, ProcessGroupHandle, override_parallel_state
from sglang.srt.environ import envs
from sglang.srt.layers.moe.ep_moe.layer import MoriEPMoE
from sglang.srt.layers.moe.token_dispatcher.base import EpConfig
from sglang.srt.layers.moe.token_dispatcher.mori_memory import (
    MIB,
    exchange_buffers,
    heap_bytes,
    parse_heap_size,
    plan_heap,
)
from sglang.srt.layers.moe.token_dispatcher.portable import PortableTransport
from sglang.srt.managers import process_launch
from sglang.srt.managers.ipc import IpcNames
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.pool_plan import PoolPlanError
from sglang.srt.model_executor.memory_plan import build_rank, check_fit, count_weights, plan_memory, plan_needs
from sglang.srt.model_executor.model_pools import make_pools, table_width
from sglang.srt.model_loader.loader import load_model
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.published_sizes import BLOCK_FP8, DEEPSEEK_V3, qwen35_like
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=8, suite="stage-a-test-cpu")

CPU = SimpleNamespace(kind="cpu", device_type="cpu", supports_graphs=False)
MI300X = SimpleNamespace(kind="hip", device_type="cuda", supports_graphs=True)
V3_SMALL = {
    **DEEPSEEK_V3, "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 16,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512, "max_position_embeddings": 256,
    "q_lora_rank": 128, "kv_lora_rank": 128,
}  # fmt: skip
QWEN = qwen35_like(4)
QWEN_SMALL = {
    **QWEN,
    "text_config": {
        **QWEN["text_config"], "hidden_size": 256, "num_experts": 16, "moe_intermediate_size": 128, "vocab_size": 512,
        "shared_expert_intermediate_size": 128, "max_position_embeddings": 256, "num_attention_heads": 4,
        "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
}  # fmt: skip
MODELS = {
    "v3": V3_SMALL,
    "v3-fp8": {**V3_SMALL, "quantization_config": BLOCK_FP8},
    "v3-tied": {**V3_SMALL, "tie_word_embeddings": True},
    "qwen3.5": QWEN_SMALL,
}
LAYOUTS: tuple[dict[str, Any], ...] = (
    {"tp_size": 1},
    {"tp_size": 2},
    {"tp_size": 4, "ep_size": 2},
    {"tp_size": 4, "ep_size": 4, "dp_size": 2, "enable_dp_attention": True},
    {"tp_size": 4, "dp_size": 4, "enable_dp_attention": True, "moe_a2a_backend": "mori"},
)
# DeepSeek-V3 over 8 ranks at the default limit, as in MORI's own examples.
V3_EP8: dict[str, Any] = dict(
    rank=0, world_size=8, hidden_dim=7168, max_num_inp_token_per_rank=4096, num_experts_per_rank=32,
    num_experts_per_token=8, data_type=torch.bfloat16, combine_type=torch.bfloat16,
)  # fmt: skip


def bytes_of_transport(transport: PortableTransport) -> int:
    tensors = [held for held in vars(transport).values() if isinstance(held, torch.Tensor)]
    return sum(tensor.nbytes for tensor in [*tensors, *transport._batch] if tensor is not None)


def planned_weights(args: ServerArgs, config: ModelConfig, rank: int) -> dict[str, int]:
    return count_weights(*build_rank(args, config, rank))


class PlanTestCase(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        cls.root = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        torch.set_num_threads(1)

    def folder(self, name: str, config: dict[str, Any]) -> str:
        path = self.root / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps(config))
        return str(path)

    def resolved(self, name: str, platform: Any = CPU, **flags: Any) -> tuple[ServerArgs, ModelConfig]:
        path = self.folder(name, MODELS.get(name, DEEPSEEK_V3))
        launch = evaluate(ServerArgs(model_path=path, load_format="dummy", **flags), platform)
        assert not launch.errors and launch.model_config is not None, launch.errors
        return launch.args, launch.model_config

    def built(self, args: ServerArgs, config: ModelConfig, rank: int) -> torch.nn.Module:
        """The model of ``rank``, as it is served."""
        tp_size = args.tp_size // args.attn_dp_size
        place = ParallelState(
            ProcessGroupHandle(rank, args.tp_size), ProcessGroupHandle(rank % tp_size, tp_size), args.ep_size
        )
        with override_parallel_state(place), override_server_args(**vars(args)):
            return load_model(config, "dummy")

    def run_plan(self, *flags: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = cli.main(flags)
            except SystemExit as end:
                status = int(end.code or 0)
        return status, out.getvalue(), err.getvalue()


class TestWeights(PlanTestCase):
    def test_every_rank_holds_what_is_planned(self):
        for name in MODELS:
            for layout in LAYOUTS:
                args, config = self.resolved(name, **layout)
                ranks = range(args.tp_size)
                built = [self.bytes_of_built(args, config, rank) for rank in ranks]
                with self.subTest(name, layout=layout):
                    self.assertEqual([sum(planned_weights(args, config, rank).values()) for rank in ranks], built)
                    self.assertEqual(sum(plan_memory(args, config, "cpu", 1 << 40, {}).weights.values()), max(built))

    def bytes_of_built(self, args: ServerArgs, config: ModelConfig, rank: int) -> int:
        """Parameters and tables of the served model, loaded: the exchange's own tensors are no weights."""
        model = self.built(args, config, rank)
        tensors = [*model.parameters(), *(t for n, t in model.named_buffers() if not n.endswith("expert_mask"))]
        # Some are views of others: what counts is memory.
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    def test_exchanges_are_those_of_the_built_model(self):
        partly = {**BLOCK_FP8, "modules_to_not_convert": ["model.layers.1.mlp.experts"]}
        with unittest.mock.patch.dict(MODELS, {"v3-partly-fp8": {**V3_SMALL, "quantization_config": partly}}):
            for name, transports in (("v3", 1), ("v3-fp8", 1), ("v3-partly-fp8", 2), ("qwen3.5", 1)):
                args, config = self.resolved(name, tp_size=2, moe_a2a_backend="mori")
                model = self.built(args, config, 0)
                layers = [module for module in model.modules() if isinstance(module, MoriEPMoE)]
                found = {id(layer.dispatcher): layer.dispatcher.transport for layer in layers}.values()
                self.assertEqual(len(found), transports)
                plan = plan_needs(args, config, "cpu", {}).exchange
                assert plan is not None
                self.assertEqual(plan.num_bytes, sum(bytes_of_transport(each) for each in found))

    def test_experts_by_hand(self):
        # Two MoE layers of 16 experts: 3 matrices of 256 x 256. In fp8 one byte each, and a float32 scale a block.
        plain, fp8 = 256 * 256 * 4, 256 * 256 + 4 * 4
        for name, ep, size in (("v3", 1, plain), ("v3", 4, plain), ("v3-fp8", 4, fp8)):
            for apart in (True, False):
                args, config = self.resolved(name, tp_size=4, ep_size=ep, disable_shared_experts_fusion=apart)
                # The fused shared expert is a slot next to those of a rank, and split with them.
                slots = 16 // ep + (0 if apart else 1)
                planned = planned_weights(args, config, 0)
                self.assertEqual(planned["routed experts"], 2 * slots * 3 * size * ep // 4)
                self.assertEqual("shared experts" in planned, apart)

    def test_groups(self):
        args, config = self.resolved("v3", disable_shared_experts_fusion=True)
        planned = planned_weights(args, config, 0)
        self.assertEqual(planned["embedding and head"], 2 * 512 * 256 * 4)
        self.assertEqual(planned["dense MLP"], 3 * 256 * 512 * 4)
        self.assertEqual(planned["shared experts"], 2 * 3 * 256 * 256 * 4)
        self.assertEqual(planned["router"], 2 * (16 * 256 + 16) * 4)
        self.assertEqual(planned["norms"], (2 * 3 + 1) * 256 * 4)
        args, config = self.resolved("v3-tied")
        self.assertEqual(planned_weights(args, config, 0)["embedding and head"], 512 * 256 * 4)

    def test_published_size_without_memory(self):
        config = {**DEEPSEEK_V3, "num_hidden_layers": 61, "first_k_dense_replace": 3}
        args, model = self.resolved_config("v3-full", config, platform=MI300X, tp_size=8, moe_a2a_backend="mori")
        planned = planned_weights(args, model, 0)
        self.assertEqual(planned["routed experts"], 58 * 32 * 3 * 7168 * 2048 * 2)

    def resolved_config(self, name: str, config: dict[str, Any], **flags: Any) -> tuple[ServerArgs, ModelConfig]:
        with unittest.mock.patch.dict(MODELS, {name: config}):
            return self.resolved(name, **flags)


class TestPools(PlanTestCase):
    def test_pools_are_what_is_planned(self):
        for name in MODELS:
            for layout in LAYOUTS[:4]:
                with self.subTest(name, layout=layout):
                    args, config = self.resolved(name, max_running_requests=4, page_size=4, **layout)
                    plan = plan_memory(args, config, "cpu", 64 * MIB, {})
                    assert plan.pools is not None, plan.problems
                    tp_size = args.tp_size // args.attn_dp_size
                    cpu = torch.device("cpu")
                    made = make_pools(args, config, plan.pools, tp_size, cpu)
                    self.assertEqual(list(plan.units), ["full", "state"] if name == "qwen3.5" else ["full"])
                    for unit, planned in plan.units.items():
                        self.assertEqual(sum(buffer.nbytes for buffer in made.buffers(unit)), planned.num_bytes)
                    table = ReqToTokenPool(4, table_width(ServerArgs(), [config])).req_to_token
                    self.assertEqual(table.numel() * table.itemsize, plan.request_table_bytes)
                    free = 64 * MIB - sum(plan.weights.values())
                    pools = plan.request_table_bytes + sum(unit.num_bytes for unit in plan.units.values())
                    self.assertLessEqual(pools, args.mem_fraction_static * free)
                    self.assertEqual(plan.left, free - pools)

    def test_what_does_not_fit_is_refused_with_the_sum(self):
        args, config = self.resolved("v3", moe_a2a_backend="mori", tp_size=2)
        needed = plan_needs(args, config, "cpu", {}).num_bytes
        plan = plan_memory(args, config, "cpu", sum(needed.values()), {})
        self.assertEqual((plan.pools, plan.left < 0), (None, True))
        for part in needed:
            self.assertIn(part, plan.problems[0])
        with self.assertRaisesRegex(PoolPlanError, "routed experts .* MoE exchange"):
            check_fit(sum(needed.values()), needed)
        check_fit(sum(needed.values()) + 1, needed)


class TestExchangeBuffers(CustomTestCase):
    def buffers(self, kernel: str, **changes: Any) -> dict[str, int]:
        return {b.name: b.num_bytes for b in exchange_buffers(EpConfig(**{**V3_EP8, **changes}), kernel)}

    def test_intra_node_by_hand(self):
        found = self.buffers("IntraNode")
        self.assertEqual(found["dispatch output"], 448 * MIB)  # 32,768 x 7168 x 2
        self.assertEqual(found["combine output"], 56 * MIB)
        self.assertEqual(found["combine input"], 32768 * (14336 + 8 * 4 + 8 * 4 + 4))
        self.assertEqual(found["ids and weights"], 5 * 32768 * 8 * 4)
        self.assertEqual(found["source map"], 4 * MIB)  # 32,768 x 32 x 4
        self.assertEqual(found["signals"], 2 * 8 * 4 * 2 * 2 + 16 * 8 * 2 + 8 + 4 + 8 * 4 * 2 * 8 + 4096 * 8)
        self.assertEqual(found["order maps"], 5 * 4 * MIB + 4096 * (8 * 4 + 4 + 8))
        self.assertNotIn("scales", found)

    def test_other_kernels_by_hand(self):
        record = 14336 + 8 * 4 + 8 * 4 + 4
        found = self.buffers("AsyncLL", max_total_recv_tokens=4096)
        for name in ("dispatch input", "combine input", "staging"):
            self.assertEqual(found[name], 8 * 4096 * record)
        self.assertEqual(found["dispatch output"], 56 * MIB)
        for kernel in ("InterNodeV1", "InterNodeV1LL"):
            found = self.buffers(kernel, world_size=16, num_experts_per_rank=16)
            self.assertEqual(found["dispatch output"], 896 * MIB)
            self.assertEqual(found["combine input"], 65536 * record)
            self.assertEqual(found["dispatch input"], 2 * 4096 * record)
            self.assertEqual(found["staging"], 4 * 4096 * record)
            self.assertEqual(found["dispatch staging"], 4096 * record)
        with self.assertRaisesRegex(ValueError, "IntraNodeLL"):
            self.buffers("IntraNodeLL")

    def test_cap_is_rounded_as_mori_does(self):
        for cap, rows in ((100, 104), (8, 8), (1, 8), (32767, 32768)):
            self.assertEqual(self.buffers("IntraNode", max_total_recv_tokens=cap)["dispatch output"], rows * 14336)

    def test_scales(self):
        fp8 = dict(data_type=torch.float8_e4m3fn, scale_dim=56)
        record = 14336 + 64 + 4 + 56 * 4
        found = self.buffers("IntraNode", **fp8)
        self.assertEqual((found["combine input"], found["scales"]), (32768 * record, 2 * 32768 * 224))
        # The codec's scales replace the dispatch's in the staging, and stand next to them elsewhere.
        found = self.buffers("IntraNode", combine_wire="fp8_blockwise")
        self.assertEqual((found["combine input"], found["scales"]), (32768 * record, 32768 * 224))
        found = self.buffers("AsyncLL", combine_wire="fp8_blockwise")
        self.assertEqual(found["combine input"], 32768 * (record - 224))
        # Together in one row: the staging has the codec's 60 scales alone.
        both = {b.name: b.num_bytes for b in exchange_buffers(
            EpConfig(**{**V3_EP8, **fp8, "combine_wire": "fp8_blockwise"}), "IntraNode", codec_groups=60)}  # fmt: skip
        self.assertEqual(both["combine input"], 32768 * (record - 224 + 240))
        self.assertEqual(both["scales"], 32768 * (240 + 224))

    def test_fake_mori_allocates_the_same_rows(self):
        use_fakes()
        run_processes(2, _compare_with_fake)

    def test_portable_transport(self):
        for changes in ({}, {"max_total_recv_tokens": 100}, {"data_type": torch.float8_e4m3fn, "scale_dim": 56}):
            sizes = EpConfig(**{**V3_EP8, **changes})
            transport = PortableTransport(sizes, ProcessGroupHandle(0, 8), "meta", gathered=True)
            self.assertEqual(sum(self.buffers("portable", **changes).values()), bytes_of_transport(transport))


def _compare_with_fake(rank: int) -> None:
    import mori
    import torch.distributed as dist

    dist.distributed_c10d._register_process_group("mori", dist.group.WORLD)
    mori.shmem.shmem_torch_process_group_init("mori")
    for cap in (0, 5, 8):
        sizes = EpConfig(
            **{**V3_EP8, "rank": rank, "world_size": 2, "hidden_dim": 64, "max_num_inp_token_per_rank": 4},
            max_total_recv_tokens=cap,
        )
        planned = {b.name: b.num_bytes for b in exchange_buffers(sizes, "IntraNode")}
        op = mori.ops.EpDispatchCombineOp(
            mori.ops.EpDispatchCombineConfig(
                data_type=torch.bfloat16,
                rank=rank,
                world_size=2,
                hidden_dim=64,
                scale_dim=0,
                scale_type_size=4,
                max_token_type_size=2,
                max_num_inp_token_per_rank=4,
                num_experts_per_rank=32,
                num_experts_per_token=8,
                max_total_recv_tokens=cap,
                gpu_per_node=2,
            )  # fmt: skip
        )
        assert planned["dispatch output"] == op._storage["out"].nbytes
        assert planned["combine output"] == op._storage["combine_out"].nbytes
        assert planned["ids and weights"] * 2 == 5 * (op._out_indices.nbytes + op._out_weights.nbytes)


class TestHeap(CustomTestCase):
    buffers = exchange_buffers(EpConfig(**V3_EP8), "IntraNode")

    def test_sizes_as_mori_reads_them(self):
        for text, size in (
            ("6G", 6 << 30), ("512M", 512 << 20), ("512MiB", 512 << 20), ("7gb", 7 << 30), ("4096", 4096), ("1K", 1024),
        ):  # fmt: skip
            self.assertEqual(parse_heap_size(text), size)
        for text in ("6.5G", "", "-1G", "6T", "six"):
            with self.assertRaisesRegex(ValueError, "integer with K, M or G"):
                parse_heap_size(text)

    def test_heap_holds_aligned_buffers(self):
        on_heap = sum(b.num_bytes for b in self.buffers if b.on_heap)
        self.assertGreaterEqual(heap_bytes(self.buffers), on_heap + 256 * len(self.buffers) + 1280)
        self.assertLess(heap_bytes(self.buffers), on_heap + 70 * MIB)

    def test_unset_is_set_and_too_small_is_refused(self):
        needed = heap_bytes(self.buffers)
        plan = plan_heap(self.buffers, {})
        self.assertEqual((plan.size, plan.variables), (needed, {"MORI_SHMEM_HEAP_SIZE": f"{needed // MIB}M"}))
        self.assertEqual(parse_heap_size(plan.variables["MORI_SHMEM_HEAP_SIZE"]), needed)
        plan = plan_heap(self.buffers, {"MORI_SHMEM_HEAP_SIZE": "4G"})
        self.assertEqual((plan.size, plan.variables, plan.problem), (4 << 30, {}, ""))
        plan = plan_heap(self.buffers, {"MORI_SHMEM_HEAP_SIZE": f"{needed // MIB - 1}M"})
        for part in ("dispatch output 448.0", "combine output 56.0", "combine input 450.1", f"set {needed // MIB}M"):
            self.assertIn(part, plan.problem)
        self.assertIn("integer", plan_heap(self.buffers, {"MORI_SHMEM_HEAP_SIZE": "1.5G"}).problem)

    def test_other_modes(self):
        self.assertEqual(plan_heap(self.buffers, {"MORI_SHMEM_MODE": "isolation"}).variables, {})
        vmm = plan_heap(self.buffers, {"MORI_SHMEM_MODE": "vmm_heap"})
        self.assertGreaterEqual(vmm.size, heap_bytes(self.buffers) + 64 * MIB * len(self.buffers))


class TestCommand(PlanTestCase):
    def setUp(self):
        self.model = self.folder("v3-4l", {**DEEPSEEK_V3, "num_hidden_layers": 4})
        self.flags = ("--model-path", self.model, "--tp", "8", "--moe-a2a-backend", "mori")

    def test_json_adds_up(self):
        status, out, _ = self.run_plan(*self.flags, "--json", "--gpu-memory-gb", "288")
        found = json.loads(out)
        self.assertEqual((status, found["memory"], found["ranks"]["ep"]), (0, 288 << 30, 8))
        parts = ("exchange", "request_table")
        taken = (*(f"{part}_bytes" for part in parts), "graphs_estimate", "runtime_estimate")
        total = sum(found["weights"].values()) + sum(found[name] for name in taken) + found["left_for_activations"]
        total += sum(unit["num_bytes"] for unit in found["units"].values())
        self.assertEqual(total, found["memory"])
        self.assertEqual(found["exchange"]["kernel"], "IntraNode")
        self.assertEqual(found["variables"], {"MORI_SHMEM_HEAP_SIZE": f"{found['exchange']['heap']['size'] // MIB}M"})
        pools = found["pools"]
        self.assertEqual(found["units"]["full"]["num_bytes"], (pools["sizes"]["full"] + 1) * 4 * 576 * 2)

    def test_rounds_and_buffers_under_a_cap(self):
        dp = ("--enable-dp-attention", "--dp", "8", "--deepep-mode", "low_latency")
        with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(2040):
            status, out, _ = self.run_plan(*self.flags, *dp, "--json")
            _, text, _ = self.run_plan(*self.flags, *dp)
        exchange = json.loads(out)["exchange"]
        self.assertEqual((status, exchange["recv_rows"], exchange["worst_recv_rows"]), (0, 2040, 32768))
        rounds = {step["step"]: (step["rows"], step["worst_case"], step["with_cap"]) for step in exchange["rounds"]}
        # 8 groups of 256 and of 1024 rows through 2,040: 2,048 need two rounds, 8,192 need five.
        self.assertEqual(rounds["decode"], (256, 1, 2))
        self.assertEqual(rounds["decode graph"], (256, 1, 2))
        self.assertEqual(rounds["prefill chunk"], (1024, 1, 5))
        self.assertRegex(text, r"prefill chunk +1 +5 ")
        self.assertRegex(text, r"dispatch output +448\.0 +27\.9 ")
        self.assertRegex(text, r"a further round")

    def test_a_cap_under_intra_node_shrinks_every_buffer(self):
        dp = ("--enable-dp-attention", "--dp", "8")
        with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(4096):
            status, out, _ = self.run_plan(*self.flags, *dp, "--json")
            _, text, _ = self.run_plan(*self.flags, *dp)
        exchange = json.loads(out)["exchange"]
        self.assertEqual((status, exchange["kernel"]), (0, "IntraNode"))
        self.assertEqual((exchange["recv_rows"], exchange["worst_recv_rows"]), (4096, 32768))
        buffers = exchange["by_kernel"]["IntraNode"]
        for worst, capped in zip(buffers["worst_case"], buffers["with_cap"], strict=True):
            if worst["name"] != "signals":
                self.assertEqual(worst["num_bytes"], 8 * capped["num_bytes"], worst["name"])
        rounds = {step["step"]: (step["rows"], step["worst_case"], step["with_cap"]) for step in exchange["rounds"]}
        # 512 rows of a rank at once.
        self.assertEqual(rounds, {"decode": (256, 1, 1), "decode graph": (256, 1, 1), "prefill chunk": (1024, 1, 2)})
        self.assertRegex(text, r"heap, AsyncLL +1928 +1532")
        # The row of a kernel that is only compared takes the least cap that it serves.
        with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(3):
            status, out, _ = self.run_plan(*self.flags, "--deepep-mode", "low_latency", "--json")
        found = {name: {b["name"]: b["num_bytes"] for b in kernel["with_cap"]}["dispatch output"]
                 for name, kernel in json.loads(out)["exchange"]["by_kernel"].items()}  # fmt: skip
        self.assertEqual((status, set(found.values())), (0, {8 * 14336}))

    def test_refusals_are_those_of_the_launch(self):
        flags = ("--model-path", self.model, "--tp", "3")
        status, _, err = self.run_plan(*flags)
        self.assertEqual(status, 2)
        for error in evaluate(read(flags), MI300X).errors:
            self.assertIn(error, err)
        status, _, err = self.run_plan(*self.flags, "--gpu-memory-gb", "4")
        self.assertEqual(status, 2)
        self.assertIn("MoE exchange", err)
        with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(7):
            status, _, err = self.run_plan(*self.flags)
        self.assertEqual(status, 2)
        self.assertIn("MORI_PREALLOC_MAX_RECV_TOKENS=7 is below 8", err)

    def test_a_request_table_past_the_memory_is_refused_by_name(self):
        status, out, err = self.run_plan("--model-path", self.model, "--tp", "8", "--max-running-requests", "400000")
        self.assertEqual(status, 2)
        self.assertRegex(out, r"request table +\d+\.\d+  400000 requests x")
        self.assertRegex(err, "request table of 400000 requests .*--max-running-requests or --context-length")

    def test_platforms(self):
        status, out, _ = self.run_plan(*self.flags, "--platform", "cuda", "--json")
        found = json.loads(out)
        self.assertEqual((status, found["exchange"]["kernel"], found["exchange"]["heap"]), (0, "portable", None))
        self.assertEqual(found["variables"], {})
        self.assertEqual((found["arch"], found["streams"]["hardware_queues"]), ("sm_90", None))


class TestLaunch(PlanTestCase):
    def planned(self, heap: str = "", **flags: Any):
        path = self.folder("v3", V3_SMALL)
        args = ServerArgs(model_path=path, load_format="dummy", tp_size=2, moe_a2a_backend="mori", **flags)
        variables = unittest.mock.patch.dict("os.environ", {"MORI_SHMEM_HEAP_SIZE": heap})
        with override_platform(RocmOverFakesPlatform(("mori",))), variables:
            return plan_launch(args)

    def test_heap_is_set_for_the_ranks_alone(self):
        launch = self.planned()
        self.assertEqual(launch.errors, [])
        self.assertEqual(list(launch.child_variables), ["MORI_SHMEM_HEAP_SIZE"])
        self.assertTrue(any(line.startswith("sets: MORI_SHMEM_HEAP_SIZE=") for line in launch.lines()))
        seen = {}

        def start(name, module, config, threads, variables):
            seen[name] = dict(variables)
            return unittest.mock.MagicMock()

        with unittest.mock.patch.object(process_launch, "_start", start):
            with unittest.mock.patch.object(process_launch, "_wait_ready", lambda child, engine: {}):
                ipc = IpcNames.create()
                process_launch.launch_engine_processes(launch.args, ipc, launch.child_variables, launch.needed)
                ipc.remove()
        heap = launch.child_variables.items()
        self.assertEqual({name: heap <= variables.items() for name, variables in seen.items()},
                         {"scheduler TP0": True, "scheduler TP1": True, "detokenizer": False})  # fmt: skip

    def test_user_value_is_kept_or_refused(self):
        self.assertEqual(self.planned("4G").child_variables, {})
        (error,) = self.planned("64M").errors
        self.assertIn("dispatch output", error)
        self.assertIn("MORI_SHMEM_HEAP_SIZE=64M", error)

    def test_a_dry_run_judges_the_release_that_is_installed(self):
        use_fakes()
        import mori

        with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(64), mori.fake_version("1.0.0"):
            launch = self.planned(dry_run=True, deepep_mode="low_latency")
            self.assertRegex("".join(launch.errors), "lacks max_total_recv_tokens=64.*Install MORI 1.1.0")
            self.assertEqual(self.planned(dry_run=True).errors, [], "IntraNode is given no cap")

    def test_settings_that_cannot_be_planned_are_errors(self):
        with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(10**6):
            self.assertIn("SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS", self.planned().errors[0])
        self.assertRegex(self.planned(dtype="float16").errors[0], "MORI carries bfloat16 .* add --dtype bfloat16")
        with envs.SGLANG_MORI_COMBINE_DTYPE.override("fp8"):
            self.assertIn("MORI_FP8_COMBINE_SCALE_DIM=", self.planned(dtype="bfloat16").errors[0])


if __name__ == "__main__":
    unittest.main()

"""Worlds of expert ranks for tests: random steps, the results of one rank with all experts, and the layers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from sglang.kernels.ops.moe.fused_experts import fused_experts_torch
from sglang.srt.configs.quantization import MXFP4, QuantConfig
from sglang.srt.distributed.parallel_state import ParallelState, ProcessGroupHandle, override_parallel_state
from sglang.srt.environ import envs
from sglang.srt.layers.moe.ep_moe.factory import describe_experts, make_experts
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.moe.topk import TopKOutput
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Method
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_loader.loader import default_dtype
from sglang.srt.platforms import override_platform, select_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform
from sglang.srt.server_args import override_server_args
from sglang.test.mxfp4_checkpoints import pack
from sglang.test.thread_ranks import ThreadRank, thread_ranks

# Rows of each group, how many of them are real (None: all), and the expert that all go to (None: any).
LOADS: tuple[tuple[list[int], list[int] | None, int | None], ...] = (
    ([5, 3, 8, 1], None, None),
    ([0, 7, 0, 2], None, None),
    ([6, 6, 6, 6], None, 5),
    ([6, 6, 6, 6], [2, 6, 0, 5], None),
)
NONE = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class EpStep:
    """One step of a world: each attention group's rows x, routing, and how many of the rows are real."""

    x: list[torch.Tensor]
    topk: list[TopKOutput]
    real: list[int]

    def to(self, device: torch.device) -> EpStep:
        topk = [TopKOutput(t.weights.to(device), t.ids.to(device)) for t in self.topk]
        return EpStep([x.to(device) for x in self.x], topk, self.real)

    def batch_of(self, group: int) -> ForwardBatch:
        """The step as ranks of ``group`` see it; padded steps say so, as recorded ones do."""
        rows = [x.shape[0] for x in self.x]
        return ForwardBatch(
            forward_mode=ForwardMode.DECODE if rows[group] else ForwardMode.IDLE,
            batch_size=rows[group],
            input_ids=NONE,
            positions=NONE,
            req_pool_indices=NONE,
            seq_lens=NONE,
            seq_lens_cpu=[],
            out_cache_loc=NONE,
            attn_backend=None,
            num_token_non_padded=torch.tensor([self.real[group]], dtype=torch.int32, device=self.x[group].device),
            num_token_non_padded_cpu=self.real[group],
            global_num_tokens_cpu=self.real if len(rows) > 1 else None,
            global_num_rows_cpu=rows if len(rows) > 1 and rows != self.real else None,
        )


@dataclass(frozen=True)
class EpModel:
    """Experts of random weights, the same in every process."""

    num_experts: int = 8
    hidden: int = 16
    width: int = 8
    top_k: int = 3
    seed: int = 0
    quant_config: QuantConfig | None = None
    dtype: torch.dtype = torch.float32
    w13: torch.Tensor = field(init=False)
    w2: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        w13 = torch.randn(self.num_experts, 2 * self.width, self.hidden, generator=generator) / self.hidden**0.5
        w2 = torch.randn(self.num_experts, self.hidden, self.width, generator=generator) / self.width**0.5
        object.__setattr__(self, "w13", w13.to(self.dtype).float())
        object.__setattr__(self, "w2", w2.to(self.dtype).float())

    def step(self, rows: list[int], real: list[int] | None = None, only: int | None = None, seed: int = 0) -> EpStep:
        """Random rows per group; ``only``: all go to the ``top_k`` experts from that one on."""
        generator = torch.Generator().manual_seed(seed)
        xs, topks = [], []
        for count in rows:
            xs.append(torch.randn(count, self.hidden, generator=generator).to(self.dtype))
            scores = torch.rand(count, self.num_experts, generator=generator)
            if only is not None:
                scores[:, only : only + self.top_k] += 1
            weights, ids = scores.topk(self.top_k)
            topks.append(TopKOutput(weights.contiguous(), ids.to(torch.int32).contiguous()))
        return EpStep(xs, topks, rows if real is None else real)

    def truth(self, step: EpStep, group: int) -> torch.Tensor:
        """Result of one rank with all experts for the group's real rows."""
        count = step.real[group]
        x, weights, ids = (t.cpu()[:count] for t in (step.x[group], step.topk[group].weights, step.topk[group].ids))
        if self.quant_config is None:
            return fused_experts_torch(x.float(), self.w13, self.w2, weights, ids)
        return self.build(ParallelState(), moe_a2a_backend="none")(x, TopKOutput(weights, ids))

    def build(self, state: ParallelState, **args: object) -> FusedMoE:
        """This rank's layer under the server settings ``args``."""
        with override_server_args(**args), override_parallel_state(state), default_dtype(self.dtype):
            layer = make_experts(self.num_experts, self.hidden, self.width, self.top_k, self.quant_config)
        for expert in range(self.num_experts):
            gate, up = self.w13[expert].chunk(2)
            for name, tensor in (("w1", gate), ("w3", up), ("w2", self.w2[expert])):
                # MXFP4 is packed beforehand, as checkpoints hold it.
                parts = pack(tensor)[:2] if isinstance(layer.quant_method, Mxfp4Method) else (tensor,)
                layer.load_expert(name, expert, *parts)
        return layer


MODEL = EpModel()
WIDE = EpModel(num_experts=16, hidden=512, width=256, top_k=4)
HALF = EpModel(dtype=torch.bfloat16)
EIGHT_BIT = EpModel(hidden=256, width=128, quant_config=QuantConfig(on_load=True))
FOUR_BIT = EpModel(hidden=64, width=32, quant_config=QuantConfig(default=MXFP4))


def thread_world(size: int, groups: int = 1, ep_size: int = 1) -> list[ParallelState]:
    """The places of ``size`` ranks in ``groups`` attention groups, as threads."""
    tp_size = size // groups
    world = thread_ranks(size)
    tps = [handle for _ in range(groups) for handle in thread_ranks(tp_size)]
    return [ParallelState(world[rank], tps[rank], ep_size) for rank in range(size)]


def run_rank(layer: FusedMoE, state: ParallelState, step: EpStep) -> torch.Tensor:
    """The rank's real rows after the sum that the MoE block ends with."""
    group = state.attn_dp_rank
    try:
        out = layer(step.x[group], step.topk[group], step.batch_of(group))
    except BaseException:
        for handle in (state.world, state.tp):
            if isinstance(handle, ThreadRank):
                handle.meeting.abort()
        raise
    return state.tp.all_reduce(out)[: step.real[group]]


def process_state(rank: int, world: int, groups: int) -> ParallelState:
    """The place of a process of the default group; ``groups`` attention groups."""
    everyone = dist.group.WORLD
    handle = ProcessGroupHandle(rank, world, everyone, everyone)
    size = world // groups
    parts = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    mine = parts[rank // size]
    return ParallelState(handle, ProcessGroupHandle(rank % size, size, mine, mine), world)


def check_state(state: ParallelState, device: torch.device, model: EpModel, cap: int, **args: object) -> FusedMoE:
    """Build the layer of one process and compare it with the reference for each of LOADS; returns it."""
    with (
        envs.SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK.override(8),
        envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(cap),
        torch.device(device),
    ):
        layer = model.build(state, **args)
    groups = state.attn_dp_size
    tolerance = 3e-2 if model.dtype == torch.bfloat16 else 1e-4 if device.type == "cpu" else 1e-3
    if model.quant_config is not None and cap:
        # Products of fewer rows may sum otherwise, and a value between experts' two products round to the next 8 bits.
        tolerance = 5e-3
    for rows, real, only in LOADS:
        step = model.step(rows[:groups], real and real[:groups], only)
        found = run_rank(layer, state, step.to(device))
        truth = model.truth(step, state.attn_dp_rank)
        torch.testing.assert_close(found.cpu().float(), truth, rtol=tolerance, atol=tolerance)
    return layer


def check_mori(rank: int, world: int, fake: bool) -> None:
    """MORI's own transport in one of ``world`` processes: identity for each mode, load and type, capped and not.

    Raises AssertionError, or what the transport refuses.
    """
    platform = RocmOverFakesPlatform(("mori",)) if fake else select_platform("rocm")
    with override_platform(platform):
        platform.set_device(rank)
        # Attention groups of one rank need no collective on the device.
        states = [process_state(rank, world, groups) for groups in ({1, world} if fake else {world})]
        models = (MODEL, HALF, EIGHT_BIT, FOUR_BIT) if fake else (WIDE, replace(WIDE, dtype=torch.bfloat16))
        settings = (("normal", 0), ("normal", 5), ("low_latency", 0), ("low_latency", 5))
        for state, model, (mode, cap) in itertools.product(states, models, settings):
            layer = check_state(state, platform.device(rank), model, cap, moe_a2a_backend="mori", deepep_mode=mode)
            said = describe_experts(layer)
            assert said["transport"].startswith("MORI") and ("FAKE" in said["transport"]) is fake, said
            assert said["received_rows"]["peak"] > 0, "no row came to this rank"


def check_portable(rank: int) -> None:
    """The portable transport in one of four processes over gloo, and rows gathered to all."""
    device = torch.device("cpu")
    for groups, mode, cap in itertools.product((1, 2, 4), ("normal", "low_latency"), (0, 9)):
        state = process_state(rank, 4, groups)
        layer = check_state(state, device, MODEL, cap, moe_a2a_backend="mori", deepep_mode=mode)
        assert describe_experts(layer)["received_rows"]["peak"] > 0, "no row came to this rank"
    for model in (MODEL, HALF):
        check_state(state, device, model, 0, moe_a2a_backend="none")
        check_state(state, device, model, 0, moe_a2a_backend="mori", deepep_mode="normal")

"""Served models run on tensors without contents, so that ops choose, and kernels specialise, as they do in serving."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import ProcessGroupHandle
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ModelWorkerBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner_build import capture_graphs, make_runner
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs, override_server_args
from sglang.test.amd_gate.walk import WalkStep, describe_error
from sglang.test.published_sizes import (
    BLOCK_FP8,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    DEEPSEEK_V4_FLASH_8L,
    qwen35_like,
)
from sglang.test.resolved_args import resolved
from sglang.test.thread_ranks import override_tp_group

DECODE_BATCHES = (1, 8, 128)
# Tokens after a prefix, for each request of a prefill step.
EXTENDS = {
    "extend 1x1024": ((1024, 0),),
    "extend 8x1024": tuple((1024, prefix) for prefix in (0, 0, 64, 512, 1024, 4096, 30_000, 100_000)),
    "extend ragged": ((777, 0), (1, 5000), (33, 2048)),
}

GREEDY = SamplingParams(temperature=0.0)
RANDOM = SamplingParams(temperature=0.7, top_k=50, top_p=0.9, min_p=0.05, frequency_penalty=0.5)


@dataclass(frozen=True)
class WalkedModel:
    """A config.json with one layer of each kind, and server arguments; one of ``tp_size`` ranks is run."""

    name: str
    config: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)


_V3 = {**DEEPSEEK_V3, "num_hidden_layers": 2}
_V3_FP8 = {**_V3, "quantization_config": BLOCK_FP8}
# A layer of each ratio, and one that routes by token id.
_V4 = {**DEEPSEEK_V4_FLASH_8L, "num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0], "num_hash_layers": 1}
WALKED_MODELS = (
    WalkedModel("v2lite", {**DEEPSEEK_V2_LITE, "num_hidden_layers": 2}),
    WalkedModel("v3", _V3),
    WalkedModel("v3-tp8", _V3, {"tp_size": 8}),
    WalkedModel("v3-fp8", _V3_FP8),
    WalkedModel("v3-fp8-tp8", _V3_FP8, {"tp_size": 8}),
    WalkedModel("v3-fp8-tp8-kv8", _V3_FP8, {"tp_size": 8, "kv_cache_dtype": "fp8_e4m3"}),
    WalkedModel("v3-mxfp4", {**_V3, "quantization_config": {**BLOCK_FP8, "expert_dtype": "fp4"}}),
    WalkedModel("v4-flash-kv8", _V4, {"attention_backend": "dsv4", "kv_cache_dtype": "fp8_e4m3"}),
    WalkedModel("qwen35", qwen35_like(4)),
    WalkedModel("qwen35-fp8-kv8", qwen35_like(4), {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}),
)


class ShapeOnlyGroup(ProcessGroupHandle):
    """One rank of ``size`` without peers: a collective returns a tensor of the right shape."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat([x] * self.size, dim=dim)

    def smallest(self, value: int) -> int:
        return value

    def all_gather_ints(self, values: Sequence[int]) -> list[list[int]]:
        return [list(values)] * self.size


class _PinsNothing(TorchFunctionMode):
    """Pinned host memory needs a device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.pin_memory:
            return args[0]
        return func(*args, **{key: value for key, value in (kwargs or {}).items() if key != "pin_memory"})


class ShapeRunner(ModelRunner):
    """The runner of one rank whose weights, pools and steps have no contents."""

    output: LogitsProcessorOutput | None = None

    def decode(self, batch_size: int) -> None:
        """The step that a graph of ``batch_size`` records, and greedy sampling from its logits."""
        with contextlib.redirect_stderr(io.StringIO()):  # the progress bar
            graphs = capture_graphs(self, [batch_size])
        for reason in graphs.refused.values():  # there are no values that a check could compare
            raise ValueError(reason)
        self.draw([GREEDY] * batch_size)

    def extend(self, requests: tuple[tuple[int, int], ...]) -> None:
        """A prefill step of (new tokens, prefix) requests, and greedy sampling from its logits."""
        total = sum(length for length, _ in requests)
        rows = list(range(len(requests)))
        batch = ModelWorkerBatch.extend(
            rows,
            [prefix for _, prefix in requests],
            [length + prefix for length, prefix in requests],
            torch.zeros(total, dtype=torch.int64),
            torch.zeros(total, dtype=torch.int64),
            rows if self.has_state else None,
        )
        self.forward(batch)
        self.draw([GREEDY] * len(requests))

    def draw(self, params: Sequence[SamplingParams]) -> None:
        """Sample from the first rows of the last step's logits, one row for each of ``params``."""
        rows = [SamplingRow(row, seed=0, prompt_ids=(), output_ids=()) for row in params]
        info = SamplingBatchInfo.from_rows(rows, self.model_config.vocab_size, self.device)
        assert self.output is not None, "a step comes first"
        positions = torch.ones(len(rows), dtype=torch.int64, device=self.device)
        self.sampler(self.output.first(len(rows)), info, positions=positions)

    def _run_model(self, forward_batch: ForwardBatch) -> LogitsProcessorOutput:
        self.output = super()._run_model(forward_batch)
        return self.output


def walk_models() -> Iterator[WalkStep]:
    """Run every step of every walked model on the current platform; a failed step has its error; others continue."""
    for model in WALKED_MODELS:
        with (
            override_tp_group(ShapeOnlyGroup(size=model.settings.get("tp_size", 1))),
            contextlib.ExitStack() as settings,
        ):
            runners: list[ShapeRunner] = []
            yield _step(model, "load", _load, model, settings, runners)
            settings.enter_context(_PinsNothing())
            for runner in runners:
                for size in DECODE_BATCHES:
                    yield _step(model, f"decode {size}", runner.decode, size)
                for name, requests in EXTENDS.items():
                    yield _step(model, name, runner.extend, requests)
                if runner.output is not None:
                    yield _step(model, "sample", runner.draw, (RANDOM, GREEDY))


def _load(model: WalkedModel, settings: contextlib.ExitStack, runners: list[ShapeRunner]) -> None:
    """Add the runner that a server would make; its arguments are the process's until ``settings`` closes."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model.config), encoding="utf-8")
        args = ServerArgs(
            model_path=folder,
            load_format="dummy",
            max_running_requests=max(DECODE_BATCHES),
            disable_cuda_graph=True,
            **{"attention_backend": "triton", **model.settings},
        )
        kind, quantization, cache = current_platform.kind, args.quantization, args.kv_cache_dtype
        config = ModelConfig.from_path(folder, platform_kind=kind, quantization=quantization, kv_cache_dtype=cache)
        args = settings.enter_context(override_server_args(**vars(resolved(args, config, current_platform))))
        made = make_runner(args, config)
        runners.append(ShapeRunner(made.loaded, made.memory, made.pools, made.attn_backend))


def _step(model: WalkedModel, name: str, run: Callable[..., None], *args: Any) -> WalkStep:
    try:
        run(*args)
    except Exception as error:
        return WalkStep(model.name, name, describe_error(error))
    return WalkStep(model.name, name)

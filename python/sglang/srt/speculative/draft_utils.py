"""Creates the draft model's attention backends, which use the pools of its own layer, and the speculative worker."""

from __future__ import annotations

import logging

from sglang.srt.configs.attention_backends import COMPRESSED, attention_backends
from sglang.srt.configs.cache_layout import STATE
from sglang.srt.configs.errors import ConfigError
from sglang.srt.layers.attention import load_attention_backends
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, AttentionContext, create_attention_backend
from sglang.srt.layers.attention.deepseek_v4_backend_hip_radix import (
    DeepseekV4HipRadixBackend,
    DeepseekV4MultiStepBackend,
)
from sglang.srt.layers.moe.ep_moe.factory import expert_recv_stats
from sglang.srt.model_executor.memory_plan import graph_buckets
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner_build import attention_context
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.accept_graphs import AcceptGraphs
from sglang.srt.speculative.draft_graphs import DraftGraphs
from sglang.srt.speculative.eagle_worker import EagleWorker
from sglang.srt.speculative.mtp_drafter import MtpDrafter
from sglang.srt.speculative.spec_info import SpecInfo

logger = logging.getLogger(__name__)


class DraftBackendFactory:
    """Creates the backends of a draft model whose KV is layer ``layer_id`` of the pools of ``context``.

    asked: the name of the target's backend; used if it is declared for the draft's attention family and this
    platform, otherwise the first declared one is. The target has no other influence: a draft model has no recurrent
    layers, and its family may differ. num_steps: draft tokens per chain; the first needs no decode step. Raises
    ValueError if the pools do not contain the layer, ConfigError if no backend is declared.
    """

    def __init__(self, asked: str, context: AttentionContext, layer_id: int, num_steps: int) -> None:
        held = [pool.spec.layer_ids for pool in context.pools if pool.spec.unit != STATE]
        if not any(layer_id in layers for layers in held):
            raise ValueError(f"the draft model's KV is layer {layer_id}, but its pools contain the layers {held}")
        self._context = context
        self._num_steps = num_steps
        self._family = context.model_config.text.attention_family
        self._name = _declared_name(asked, self._family)

    def create_decode_backend(self) -> AttentionBackend | DeepseekV4MultiStepBackend:
        """The backend for the chain of draft steps, with one row per request."""
        return self._create_dsv4_decode_backend() if self._family == COMPRESSED else self._create()

    def create_prefill_backend(self) -> AttentionBackend:
        """The backend for rows that the target has computed: prompts, and the rows of a verify step.

        It is a second object because captured steps of the two kinds need different buffers.
        """
        return self._create_dsv4_prefill_backend() if self._family == COMPRESSED else self._create()

    # One class for every platform; an MTP layer has only a sliding window, and no pools of compressed entries.
    def _create_dsv4_decode_backend(self) -> DeepseekV4MultiStepBackend:
        return DeepseekV4MultiStepBackend(self._context, self._num_steps - 1)

    def _create_dsv4_prefill_backend(self) -> DeepseekV4HipRadixBackend:
        return DeepseekV4HipRadixBackend(self._context, windows_only=True)

    def _create(self) -> AttentionBackend:
        load_attention_backends()
        return create_attention_backend(self._name, self._context)


def _declared_name(asked: str, family: str) -> str:
    declared, kind = attention_backends(family), current_platform.kind
    fitting = [name for name, declaration in declared.items() if kind in declaration.platforms]
    if not fitting:
        there = ", ".join(f"{name} ({', '.join(d.platforms)})" for name, d in declared.items()) or "none"
        raise ConfigError(
            f"no attention backend for a draft model of the family {family} runs on {kind}; declared: {there}"
        )
    if asked in fitting:
        return asked
    logger.warning(
        "the draft model uses attention backend %s: %s has no %s attention on %s", fitting[0], asked, family, kind
    )
    return fitting[0]


def make_speculator(args: ServerArgs, runner: ModelRunner) -> EagleWorker | None:
    """The speculative worker on top of ``runner`` for the resolved ``args``; None without speculation."""
    if args.speculative_algorithm is None:
        return None
    assert args.speculative_num_steps is not None and args.attention_backend is not None
    assert runner.loaded.draft is not None
    context = attention_context(runner.loaded, runner.memory, runner.pools)
    layer_id = runner.model_config.num_hidden_layers
    backends = DraftBackendFactory(args.attention_backend, context, layer_id, args.speculative_num_steps)
    spec = SpecInfo(args.speculative_num_steps)
    extend_backend = backends.create_prefill_backend()
    drafter = MtpDrafter(
        runner.loaded.draft, runner, extend_backend, backends.create_decode_backend(), spec,
        extend_backend.plans_like(runner.attn_backend),
    )  # fmt: skip
    worker = EagleWorker(runner, spec, drafter)
    if not args.disable_cuda_graph:
        graphs = DraftGraphs(drafter, runner, spec, graph_buckets(args))
        drafter.graphs = graphs
        graphs.capture()
        accept_graphs = AcceptGraphs(worker, graphs.buffers)
        worker.graphs = accept_graphs
        accept_graphs.capture()
        for recv_stats in expert_recv_stats(runner.model):
            recv_stats.forget()
    return worker

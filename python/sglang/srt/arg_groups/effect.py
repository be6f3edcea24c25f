"""Settings that are accepted but have no effect with this model, platform or other settings. Each is logged once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from sglang.srt.configs.cache_layout import STATE, SWA
from sglang.srt.environ import EnvField, envs
from sglang.srt.server_args import ServerArgs

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.platforms import Platform


@dataclass(frozen=True)
class Situation:
    """What decides if a setting has an effect: ``asked`` as given, ``args`` as resolved; ``model`` None: unreadable."""

    asked: ServerArgs
    args: ServerArgs
    model: ModelConfig | None
    platform: Platform
    environ: Mapping[str, str]


# Why a setting has no effect; "" if it has one.
Reason = Callable[[Situation], str]


def _no_exchange(here: Situation) -> str:
    refused = here.asked.deepep_mode == "low_latency"
    return "--moe-a2a-backend is none" if here.args.moe_a2a_backend == "none" and not refused else ""


def _no_mori(here: Situation) -> str:
    return f"--moe-a2a-backend is {here.args.moe_a2a_backend}" if here.args.moe_a2a_backend != "mori" else ""


def _one_rank(here: Situation) -> str:
    return "there is only one rank" if here.args.tp_size == 1 else ""


def _no_graphs(here: Situation) -> str:
    return "no decode graphs are captured" if here.args.disable_cuda_graph else ""


def _no_extend_graphs(here: Situation) -> str:
    args = here.args
    if args.disable_cuda_graph or args.disable_piecewise_cuda_graph:
        return "no prompt steps are captured"
    if args.steps_differ:
        return "prompt steps are not captured where the steps of ranks differ"
    sizes, chunk = args.piecewise_cuda_graph_tokens, args.chunked_prefill_size or 0
    return f"prompt steps have at most {chunk} tokens" if 0 < chunk < min(sizes or [chunk]) else ""


def _no_states(here: Situation) -> str:
    states = here.model is None or here.model.text.cache_layout().has(STATE)
    return "" if states else "the model has no recurrent states"


def _no_window(here: Situation) -> str:
    windows = here.model is None or here.model.text.cache_layout().has(SWA)
    return "" if windows else "the model has no separate pools for a sliding window"


def _state_dtype(here: Situation) -> str:
    if here.asked.mamba_ssm_dtype is not None:
        return f"--mamba-ssm-dtype {here.asked.mamba_ssm_dtype} takes precedence"
    return _no_states(here)


def _no_shared_experts(here: Situation) -> str:
    none = here.model is not None and not here.model.text.shared_experts.blocks
    return "the model has no shared experts" if none else ""


FLAGS: dict[str, Reason] = {
    "deepep_mode": _no_exchange,
    "load_balance_method": lambda here: "--dp-size is 1" if here.args.dp_size == 1 else "",
    "nccl_port": _one_rank,
    "dist_timeout": _one_rank,
    "cuda_graph_bs": _no_graphs,
    "cuda_graph_max_bs": _no_graphs,
    "disable_piecewise_cuda_graph": _no_graphs,
    "piecewise_cuda_graph_tokens": _no_extend_graphs,
    "piecewise_cuda_graph_max_tokens": _no_extend_graphs,
    "mamba_ssm_dtype": _no_states,
    "swa_full_tokens_ratio": _no_window,
    "disable_shared_experts_fusion": _no_shared_experts,
}
VARIABLES: tuple[tuple[EnvField[Any], Reason], ...] = (
    (envs.SGLANG_MAMBA_SSM_DTYPE, _state_dtype),
    (envs.SGLANG_MAMBA_CONV_DTYPE, _no_states),
    (
        envs.SGLANG_TEST_RETRACT_INTERVAL,
        lambda here: "" if envs.SGLANG_TEST_RETRACT.read(here.environ) else "SGLANG_TEST_RETRACT is off",
    ),
    (
        envs.SGLANG_FAKE_ROCM_ARCH,
        lambda here: "" if here.platform.device_type == "cpu" else "the architecture of the GPU is used",
    ),
    (envs.SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK, _no_mori),
    (envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS, _no_mori),
    (envs.SGLANG_MORI_MOE_MAX_INPUT_TOKENS, _no_mori),
    (envs.SGLANG_MORI_DISPATCH_DTYPE, _no_mori),
    (envs.SGLANG_MORI_COMBINE_DTYPE, _no_mori),
    (
        envs.SGLANG_MORI_DISPATCH_INTER_KERNEL_SWITCH_THRESHOLD,
        lambda here: _no_mori(here) or ("all ranks are on one node" if here.args.tp_size <= 8 else ""),
    ),
)


def without_effect(here: Situation) -> list[str]:
    """One line for each setting that was given and has no effect.

    Values are checked elsewhere, with an effect or not. The launch check reports variables of another platform, and
    ``stream_policy`` those of second streams. Raises EnvError for a wrong variable that a reason reads.
    """
    found = []
    defaults = {field.name: field.default for field in fields(here.asked)}
    for name, reason in FLAGS.items():
        value = getattr(here.asked, name)
        because = reason(here) if value != defaults[name] else ""
        if because:
            shown = "" if value is True else f" {' '.join(map(str, value)) if isinstance(value, list) else value}"
            found.append(f"--{name.replace('_', '-')}{shown} has no effect: {because}")
    for variable, reason in VARIABLES:
        acts_here = variable.platform in ("", here.platform.kind)
        because = reason(here) if acts_here and variable.find(here.environ) is not None else ""
        if because:
            found.append(f"{variable.name} has no effect: {because}")
    return found

"""What the server says of itself: the model, the settings, the scheduler's state, the chosen kernels, its load."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.environ import check_environment
from sglang.srt.managers.request_state import WEIGHT_VERSION
from sglang.srt.utils import limits
from sglang.srt.utils.audit import unpickle_count
from sglang.version import __version__

_SECRETS = ("api_key", "admin_api_key")


def model_info(context: ServerContext) -> dict[str, Any]:
    """For ``/model_info``."""
    args = context.server_args
    return {
        "model_path": args.model_path,
        "tokenizer_path": args.tokenizer_path,
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": WEIGHT_VERSION,
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": context.model_config.hf_config.get("model_type"),
        "architectures": [context.model_config.architecture],
    }


async def server_info(context: ServerContext) -> dict[str, Any]:
    """For ``/server_info``: every setting (keys redacted), the variables that are set, and the scheduler's state."""
    states = await context.manager.get_internal_states()
    state = states[0]
    settings = asdict(context.server_args)
    for name in _SECRETS:
        settings[name] = None if settings[name] is None else "<redacted>"
    settings["served_model_name"] = context.served_model_name
    return {
        **settings,
        **context.scheduler_info,
        "status": context.status.value,
        "version": __version__,
        "limits": limits.shown(),
        "admission": _front(context),
        "env": dict(check_environment().set_variables),
        "platform": state.get("platform"),
        "fakes": state.get("fakes", []),
        "kernels": state.get("kernels", {}),
        "unpickled_while_serving": unpickle_count(),
        "internal_states": states,
    }


async def load(context: ServerContext) -> list[dict[str, Any]]:
    """For ``/get_load``: one entry a DP rank."""
    entries = []
    for dp_rank, state in enumerate(await context.manager.get_internal_states()):
        waiting = state.get("num_queue_reqs", 0)
        entries.append(
            {
                "dp_rank": dp_rank,
                "num_reqs": state.get("num_running_reqs", 0) + waiting,
                "num_waiting_reqs": waiting,
                "num_tokens": state.get("num_used_tokens", 0),
                "num_pending_tokens": 0,
                "ts_tic": time.time(),
            }
        )
    return entries


async def loads(context: ServerContext) -> dict[str, Any]:
    """For ``/v1/loads``: one entry a DP rank."""
    entries = []
    for dp_rank, state in enumerate(await context.manager.get_internal_states()):
        total = max(1, state.get("max_total_num_tokens", 0) or context.scheduler_info.get("max_total_num_tokens", 1))
        used = state.get("num_used_tokens", 0)
        entries.append(
            {
                "dp_rank": dp_rank,
                "num_running_reqs": state.get("num_running_reqs", 0),
                "num_waiting_reqs": state.get("num_queue_reqs", 0),
                "num_used_tokens": used,
                "max_total_num_tokens": total,
                "token_usage": used / total,
                "gen_throughput": state.get("last_gen_throughput", 0.0),
            }
        )
    return {"timestamp": time.time(), "version": __version__, "dp_rank_count": len(entries), "loads": entries}


# Name in upstream's dashboards, type, help, and the key of the scheduler's state.
_METRICS = (
    ("num_running_reqs", "gauge", "Requests that run now.", "num_running_reqs"),
    ("num_queue_reqs", "gauge", "Requests that wait.", "num_queue_reqs"),
    ("num_used_tokens", "gauge", "Tokens that the KV pool holds for requests.", "num_used_tokens"),
    ("max_total_num_tokens", "gauge", "Tokens that the KV pool has room for.", "max_total_num_tokens"),
    ("gen_throughput", "gauge", "Generated tokens a second, as last logged.", "last_gen_throughput"),
    ("num_retracted_reqs", "gauge", "Requests retracted since start.", "num_retracted_reqs"),
    ("num_aborted_requests_total", "counter", "Requests aborted since start.", "num_aborted_reqs"),
    (
        "prompt_tokens_total",
        "counter",
        "Prompt tokens of requests begun since start, cached ones too.",
        "num_prompt_tokens",
    ),
    ("cached_tokens_total", "counter", "Prompt tokens found in the prefix cache since start.", "num_cached_tokens"),
    ("generation_tokens_total", "counter", "Tokens generated since start.", "num_generated_tokens"),
    ("spec_accept_length", "gauge", "Tokens per verify step of a request, as last logged.", "spec_accept_length"),
    ("spec_accept_rate", "gauge", "Part of the drafts that became output, as last logged.", "spec_accept_rate"),
    ("spec_draft_tokens_total", "counter", "Tokens guessed by speculation since start.", "num_drafts"),
    ("spec_accepted_tokens_total", "counter", "Guesses that became output since start.", "num_accepted_drafts"),
)

# The same of the HTTP process; keys of ``_front``.
_FRONT_METRICS = (
    ("num_refused_requests_total", "counter", "Calls refused since start because the queue is full.", "num_refused"),
    ("num_timed_out_requests_total", "counter", "Calls ended at their time limit since start.", "num_timed_out"),
)

# The same of the exchange of tokens between experts; keys of RecvGauge.snapshot.
_RECV_METRICS = (
    ("moe_recv_rows", "gauge", "Most rows of a dispatch since the last look at this rank's state.", "live"),
    ("moe_recv_rows_peak", "gauge", "Most rows of a dispatch since start.", "peak"),
    ("moe_recv_rows_bound", "gauge", "Most rows that could arrive in a dispatch since start.", "bound"),
    ("moe_recv_buffer_rows", "gauge", "Rows of the receive buffer.", "buffer"),
    ("moe_recv_suggested_cap", "gauge", "Least receive cap that needs no second round so far.", "suggested_cap"),
    ("moe_rounds_max", "gauge", "Most rounds of a step since start.", "most_rounds"),
    ("moe_input_limit_raised_total", "counter", "Input limits raised to what can arrive.", "input_limit_raised"),
)


async def metrics_text(context: ServerContext) -> str:
    """The schedulers' counters in Prometheus' text format, under upstream's names; ``dp_rank`` tells several apart."""
    states = await context.manager.get_internal_states()
    name = context.served_model_name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    received = [state.get("experts", {}).get("received_rows", {}) for state in states]
    lines = _metric_lines(_METRICS, states, name) + _metric_lines(_FRONT_METRICS, [_front(context)], name)
    lines += _metric_lines(_RECV_METRICS, received, name)
    return "\n".join(lines + _position_lines(states, name) + _overlap_lines(states[0], name)) + "\n"


def _front(context: ServerContext) -> dict[str, int]:
    """What the HTTP process counts by itself."""
    manager = context.manager
    return {
        "num_waiting": manager.admission.num_requests,
        "num_refused": manager.admission.num_refused,
        "num_timed_out": manager.num_timed_out,
    }


def _metric_lines(metrics: Sequence[tuple[str, ...]], states: Sequence[dict[str, Any]], name: str) -> list[str]:
    """Every metric whose key the first DP rank has, one value a rank."""
    lines = []
    for metric, kind, text, key in metrics:
        if key not in states[0]:
            continue
        lines.append(f"# HELP sglang:{metric} {text}\n# TYPE sglang:{metric} {kind}")
        for dp_rank, state in enumerate(states):
            lines.append(f"sglang:{metric}{{{_labels(states, dp_rank, name)}}} {state[key]}")
    return lines


def _labels(states: Sequence[dict[str, Any]], dp_rank: int, name: str) -> str:
    rank = f',dp_rank="{dp_rank}"' if len(states) > 1 else ""
    return f'model_name="{name}",engine_type="unified",tp_rank="0"{rank}'


def _position_lines(states: Sequence[dict[str, Any]], name: str) -> list[str]:
    """The part of the verify steps in which the first, second, ... draft became output; nothing without speculation."""
    metric = "sglang:spec_accept_rate_by_position"
    text = "Part of the verify steps in which the draft at this position became output, as last logged."
    rows = []
    for dp_rank, state in enumerate(states):
        for position, rate in enumerate(state.get("spec_accept_rate_by_position", ()), start=1):
            rows.append(f'{metric}{{{_labels(states, dp_rank, name)},position="{position}"}} {rate}')
    return [f"# HELP {metric} {text}\n# TYPE {metric} gauge", *rows] if rows else []


def _overlap_lines(state: dict[str, Any], name: str) -> list[str]:
    """What SGLANG_TRACE_OVERLAP measured on the first rank; nothing when it is off."""
    rows = state.get("streams", {}).get("trace", [])
    if not rows:
        return []
    metric = "sglang:stream_overlap_share"
    lines = [f"# HELP {metric} Part of a side computation's time beside the main one.\n# TYPE {metric} gauge"]
    for row in rows:
        labels = f'model_name="{name}",site="{row["site"]}",num_tokens="{row["num_tokens"]}"'
        captured = str(row["captured"]).lower()
        lines.append(f'{metric}{{{labels},captured="{captured}"}} {row["beside_share"]}')
    return lines

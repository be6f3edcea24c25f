"""The contents of information endpoints: model, settings, state of the schedulers, chosen kernels, load."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.environ import check_environment
from sglang.srt.managers.request_state import WEIGHT_VERSION
from sglang.srt.utils import limits
from sglang.srt.utils.audit import unpickle_count
from sglang.version import __version__

_SECRETS = ("api_key", "admin_api_key")


async def model_info(context: ServerContext) -> dict[str, Any]:
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
        "admission": front(context),
        "env": dict(check_environment().set_variables),
        "platform": state.get("platform"),
        "fakes": state.get("fakes", []),
        "kernels": state.get("kernels", {}),
        "unpickled_while_serving": unpickle_count(),
        "internal_states": states,
    }


async def load(context: ServerContext) -> list[dict[str, Any]]:
    """For ``/get_load``: one entry per DP rank."""
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
    """For ``/v1/loads``: one entry per DP rank."""
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


def front(context: ServerContext) -> dict[str, int]:
    """What the HTTP process itself counts."""
    manager = context.manager
    return {
        "num_waiting": manager.admission.num_requests,
        "num_refused": manager.admission.num_refused,
        "num_timed_out": manager.num_timed_out,
    }

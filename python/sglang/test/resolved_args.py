"""Settings resolved for a model and a platform that need no folder and no machine."""

from __future__ import annotations

from sglang.srt.arg_groups.plan import LaunchPlan, resolve
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.platforms import Platform
from sglang.srt.server_args import ServerArgs, ServerArgsError


def resolved(args: ServerArgs, model: ModelConfig, platform: Platform) -> ServerArgs:
    """``args`` as a launch would resolve them; raises ServerArgsError with every problem."""
    plan = LaunchPlan(args, model)
    resolve(plan, platform)
    if plan.errors:
        raise ServerArgsError(plan.errors)
    return plan.args

"""What is wrong with a command line, and settings resolved for a model and a platform without folder and machine."""

from __future__ import annotations

from sglang.srt.arg_groups.parse import parse
from sglang.srt.arg_groups.plan import LaunchPlan, resolve
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.platforms import Platform
from sglang.srt.server_args import ServerArgs, ServerArgsError


def errors_of(line: str | list[str]) -> list[str]:
    """Errors of parse for a command line; [] if it is accepted."""
    try:
        parse(line.split() if isinstance(line, str) else line)
    except ServerArgsError as error:
        return error.errors
    return []


def resolved(args: ServerArgs, model: ModelConfig, platform: Platform) -> ServerArgs:
    """``args`` as a launch would resolve them; raises ServerArgsError with every problem."""
    plan = LaunchPlan(args, model)
    resolve(plan, platform)
    if plan.errors:
        raise ServerArgsError(plan.errors)
    return plan.args

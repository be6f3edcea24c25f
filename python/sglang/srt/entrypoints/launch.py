"""From settings to a running engine: the part of start-up that the HTTP server and the offline Engine share."""

from __future__ import annotations

import logging

from sglang.srt.arg_groups.plan import LaunchPlan
from sglang.srt.configs.errors import ConfigError
from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.managers.ipc import IpcNames
from sglang.srt.managers.process_launch import EngineProcesses, launch_engine_processes
from sglang.srt.managers.request_input import RequestError
from sglang.srt.managers.step_profiler import folder_problem
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgsError, specs
from sglang.srt.utils.chat_template import ChatTemplateError
from sglang.srt.utils.hf_tokenizer import Tokenizer, TokenizerError
from sglang.srt.utils.network import PortError

logger = logging.getLogger(__name__)

# Errors that mean a wrong setting, in addition to ServerArgsError.
USER_ERRORS = (ChatTemplateError, ConfigError, PortError, TokenizerError)


def check_plan(plan: LaunchPlan) -> None:
    """Log what resolution decided, in full at level debug; raises ServerArgsError with every reason against it."""
    for warning in plan.warnings:
        logger.warning("%s", warning)
    profile_dir = plan.args.profile_dir
    if not plan.errors and profile_dir is not None and (problem := folder_problem(profile_dir)):
        plan.errors.append(problem)
    if plan.errors:
        raise ServerArgsError(plan.errors)
    args, defaults = plan.args, {spec.name: spec.default for spec in specs()}
    for change in plan.changes:
        logger.log(logging.DEBUG if change.old == defaults[change.field] else logging.INFO, "%s", change)
    logger.info(
        "serving %s on %s: %s, context of %s tokens, up to %s requests at once, random seed %s. "
        "%d settings were chosen: --dry-run shows each with its reason",
        args.model_path, plan.platform, args.dtype, args.context_length, args.max_running_requests,
        args.random_seed, len({change.field for change in plan.changes}),
    )  # fmt: skip
    for name, value in plan.variables.items():
        logger.info("variable %s=%s", name, value)
    for name, value in plan.child_variables.items():
        logger.info("%s=%s for the scheduler processes", name, value)


def start_engine(plan: LaunchPlan) -> tuple[ServerContext, EngineProcesses]:
    """Log the plan, read the tokenizer, start the processes, and wait until they are ready.

    Raises ServerArgsError with every reason against the plan; TokenizerError, ChatTemplateError, ConfigError or
    LaunchError.
    """
    check_plan(plan)
    args, model_config = plan.args, plan.model_config
    assert model_config is not None
    tokenizer = None
    if not args.skip_tokenizer_init:
        source = args.tokenizer_path or args.model_path
        tokenizer = Tokenizer.from_path(source, args.chat_template)
        model_config = model_config.with_tokenizer_end(tokenizer.eos_token_ids, source)
    ipc = IpcNames.create(args.dp_size)
    manager = TokenizerManager(args, model_config, tokenizer, ipc)
    try:
        processes = launch_engine_processes(args, ipc, plan.child_variables, plan.needed)
    except BaseException:
        manager.close_sockets()
        raise
    return ServerContext(manager, args, model_config, processes.scheduler_info), processes


def check_engine(context: ServerContext, processes: EngineProcesses) -> str | None:
    """None while all children run; else what ended, after failing every request with it."""
    dead = processes.check_alive()
    if dead is not None:
        context.manager.fail(RequestError(f"The engine failed: {dead}.", 500, "InternalServerError"))
    return dead

"""From settings to a running engine: the part of start-up that the HTTP server and the offline Engine share."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.layers.moe.token_dispatcher.config import mori_setting_problems
from sglang.srt.managers.ipc import IpcNames
from sglang.srt.managers.process_launch import EngineProcesses, launch_engine_processes
from sglang.srt.managers.request_input import RequestError
from sglang.srt.managers.step_profiler import folder_problem
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs, ServerArgsError, evaluate, specs
from sglang.srt.utils.hf_tokenizer import Tokenizer

if TYPE_CHECKING:
    from sglang.srt.server_args_verdict import Verdict

logger = logging.getLogger(__name__)


def judge(request: Sequence[str] | ServerArgs) -> Verdict:
    """``evaluate``, and what follows for the ranks: streams, and the memory of the exchange between expert ranks."""
    verdict = evaluate(request)
    if verdict.errors or verdict.model_config is None:
        return verdict
    try:
        _plan_streams(verdict)
        _plan_needs(verdict)
        if verdict.args.dry_run:
            _try_tokenizer(verdict)
    except ValueError as error:
        verdict.errors.append(str(error))
    return verdict


def _plan_streams(verdict: Verdict) -> None:
    """The variables that second streams need; a dry run also asks the device, and says what the ranks would say."""
    from sglang.srt.utils.stream_policy import plan_streams, stream_variables

    args, config = verdict.args, verdict.model_config
    assert config is not None
    verdict.child_variables |= stream_variables(args, config.text.overlap_sites)
    if args.dry_run:
        refusal = config.shared_fusion_refusal(args.moe_a2a_backend)
        plan = plan_streams(args, refusal, config.text.overlap_sites, variables=verdict.child_variables)
        verdict.streams += plan.lines()
        verdict.warnings += plan.warnings


def _plan_needs(verdict: Verdict) -> None:
    """Count what a rank holds, once for all ranks; on a CPU nobody asks for it unless experts exchange tokens."""
    verdict.errors += mori_setting_problems(verdict.args)
    if verdict.errors or (verdict.args.moe_a2a_backend == "none" and verdict.platform == "cpu"):
        return
    from sglang.srt.model_executor.memory_plan import plan_needs

    assert verdict.model_config is not None
    args = verdict.args
    # The ranks of a launch judge the release themselves; a dry run has none.
    needs = plan_needs(args, verdict.model_config, verdict.platform, os.environ, judge_release=args.dry_run)
    verdict.needed = needs.num_bytes
    if needs.exchange is not None:
        verdict.errors += needs.exchange.problems
        verdict.child_variables |= needs.exchange.heap.variables if needs.exchange.heap is not None else {}


def _try_tokenizer(verdict: Verdict) -> None:
    """Read the tokenizer as the launch would, where there is one. Raises ValueError for one that cannot be used."""
    args, config = verdict.args, verdict.model_config
    assert config is not None
    source = args.tokenizer_path or args.model_path
    if not args.skip_tokenizer_init and (Path(source) / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_path(source, args.chat_template)
        config.with_tokenizer_end(tokenizer.eos_token_ids, source)


def accept(verdict: Verdict) -> None:
    """Log what resolution decided, in full at level debug; raises ServerArgsError with every reason against it."""
    for warning in verdict.warnings:
        logger.warning("%s", warning)
    profile_dir = verdict.args.profile_dir
    if not verdict.errors and profile_dir is not None and (problem := folder_problem(profile_dir)):
        verdict.errors.append(problem)
    if verdict.errors:
        raise ServerArgsError(verdict.errors)
    args, defaults = verdict.args, {spec.name: spec.default for spec in specs()}
    for change in verdict.changes:
        logger.log(logging.DEBUG if change.old == defaults[change.field] else logging.INFO, "%s", change)
    logger.info(
        "serving %s on %s: %s, context of %s tokens, up to %s requests at once, random seed %s. "
        "%d settings were chosen: --dry-run shows each with its reason",
        args.model_path, verdict.platform, args.dtype, args.context_length, args.max_running_requests,
        args.random_seed, len({change.field for change in verdict.changes}),
    )  # fmt: skip
    for name, value in verdict.variables.items():
        logger.info("variable %s=%s", name, value)
    for name, value in verdict.child_variables.items():
        logger.info("%s=%s for the scheduler processes", name, value)


def start_engine(verdict: Verdict) -> tuple[ServerContext, EngineProcesses]:
    """Read the tokenizer, start the processes, and wait until they are ready.

    ``verdict`` must be accepted. Raises TokenizerError, ChatTemplateError, ConfigError or LaunchError.
    """
    args, model_config = verdict.args, verdict.model_config
    assert model_config is not None
    tokenizer = None
    if not args.skip_tokenizer_init:
        source = args.tokenizer_path or args.model_path
        tokenizer = Tokenizer.from_path(source, args.chat_template)
        model_config = model_config.with_tokenizer_end(tokenizer.eos_token_ids, source)
    ipc = IpcNames.create(args.dp_size)
    manager = TokenizerManager(args, model_config, tokenizer, ipc)
    try:
        processes = launch_engine_processes(args, ipc, verdict.child_variables, verdict.needed)
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

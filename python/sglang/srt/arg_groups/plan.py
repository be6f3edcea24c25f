"""The door to a launch: ``plan_launch`` decides from settings what the processes of the engine are given."""

from __future__ import annotations

import os
from pathlib import Path

from sglang.srt.arg_groups.evaluate import LaunchPlan, evaluate
from sglang.srt.arg_groups.parse import Parsed
from sglang.srt.layers.moe.token_dispatcher.config import mori_setting_problems
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.hf_tokenizer import Tokenizer


def plan_launch(request: ServerArgs | Parsed) -> LaunchPlan:
    """What a launch comes to: settings as resolved, and what the ranks are given: streams, variables, memory.

    Nothing is started, and problems are collected in the plan.
    """
    plan = evaluate(request)
    if plan.errors or plan.model_config is None:
        return plan
    try:
        _plan_streams(plan)
        _plan_needs(plan)
        if plan.args.dry_run:
            _try_tokenizer(plan)
    except ValueError as error:
        plan.errors.append(str(error))
    return plan


def _plan_streams(plan: LaunchPlan) -> None:
    """The variables that second streams need; a dry run also asks the device, and says what the ranks would say."""
    from sglang.srt.utils.stream_policy import plan_streams, stream_variables

    args, config = plan.args, plan.model_config
    assert config is not None
    plan.child_variables |= stream_variables(args, config.text.overlap_sites)
    if args.dry_run:
        refusal = config.shared_fusion_refusal(args.moe_a2a_backend)
        streams = plan_streams(args, refusal, config.text.overlap_sites, variables=plan.child_variables)
        plan.streams += streams.lines()
        plan.warnings += streams.warnings


def _plan_needs(plan: LaunchPlan) -> None:
    """Count what a rank holds, once for all ranks; on a CPU nobody asks for it unless experts exchange tokens."""
    plan.errors += mori_setting_problems(plan.args)
    if plan.errors or (plan.args.moe_a2a_backend == "none" and plan.platform == "cpu"):
        return
    from sglang.srt.model_executor.memory_plan import plan_needs

    assert plan.model_config is not None
    args = plan.args
    # The ranks of a launch judge the release themselves; a dry run has none.
    needs = plan_needs(args, plan.model_config, plan.platform, os.environ, judge_release=args.dry_run)
    plan.needed = needs.num_bytes
    if needs.exchange is not None:
        plan.errors += needs.exchange.problems
        plan.child_variables |= needs.exchange.heap.variables if needs.exchange.heap is not None else {}


def _try_tokenizer(plan: LaunchPlan) -> None:
    """Read the tokenizer as the launch would, where there is one. Raises ValueError for one that cannot be used."""
    args, config = plan.args, plan.model_config
    assert config is not None
    source = args.tokenizer_path or args.model_path
    if not args.skip_tokenizer_init and (Path(source) / "tokenizer.json").is_file():
        tokenizer = Tokenizer.from_path(source, args.chat_template)
        config.with_tokenizer_end(tokenizer.eos_token_ids, source)

"""Entry point of a launch: ``plan_launch`` decides from settings what the processes of the engine are given."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang.srt.arg_groups.checks import remarks
from sglang.srt.arg_groups.effect import Situation, without_effect
from sglang.srt.arg_groups.keys import find_keys
from sglang.srt.arg_groups.parse import Parsed, check
from sglang.srt.arg_groups.resolve import STEPS
from sglang.srt.arg_groups.steps import Change, Context
from sglang.srt.configs.model_folder import cached_folder, download_line, is_model_id
from sglang.srt.environ import EnvError, check_environment, envs
from sglang.srt.layers.moe.token_dispatcher.config import mori_setting_problems
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.hf_tokenizer import Tokenizer

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.platforms import Platform


@dataclass
class LaunchPlan:
    """Accepted when ``errors`` is empty; ``args`` are then resolved and ``model_config`` is read.

    ``changes`` says what resolution set and why; ``variables`` are the environment variables that are set, secrets
    redacted. ``child_variables`` are those that the launch sets for the processes of the ranks; ``needed`` is
    the memory each rank needs (bytes by purpose), empty if the ranks do not use it. Problems of the model
    folder come last in ``errors`` and begin with "model: ".
    """

    args: ServerArgs
    model_config: ModelConfig | None = None
    platform: str = "none"
    changes: list[Change] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)
    child_variables: dict[str, str] = field(default_factory=dict)
    needed: dict[str, int] = field(default_factory=dict)
    # What a dry run reports about shared experts and overlap sites.
    streams: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The plan for people: one line on the outcome, then a line for each setting and remark."""
        reasons = f"{len(self.errors)} reason{'' if len(self.errors) == 1 else 's'}"
        outcome = f"refused ({reasons})" if self.errors else "accepted"
        return [
            f"dry run: {outcome}, platform {self.platform}, model {self.args.model_path}",
            *(f"variable: {name}={value}" for name, value in self.variables.items()),
            *(f"resolved: {change}" for change in self.changes),
            *(f"streams: {line}" for line in self.streams),
            *(f"sets: {name}={value}" for name, value in self.child_variables.items()),
            *(f"warning: {text}" for text in self.warnings),
            *(f"error: {text}" for text in self.errors),
        ]


def plan_launch(request: ServerArgs | Parsed) -> LaunchPlan:
    """The complete plan of a launch; nothing is started, and problems are collected in it."""
    plan = evaluate(request)
    if plan.args.dry_run and plan.platform != "none":
        _try_kernels(plan)
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


def _try_kernels(plan: LaunchPlan) -> None:
    """Apply ``SGLANG_KERNELS`` as the ranks would; without it there is nothing that could be wrong."""
    if envs.SGLANG_KERNELS.is_set():
        from sglang.kernels.registry import REGISTRY, KernelConfigError

        try:
            REGISTRY.freeze()
        except KernelConfigError as error:
            plan.errors.append(str(error))


def _plan_streams(plan: LaunchPlan) -> None:
    """The variables that second streams need; a dry run also reads the device, and reports what the ranks would log."""
    from sglang.srt.arg_groups.stream_policy import plan_streams, stream_variables

    args, config = plan.args, plan.model_config
    assert config is not None
    plan.child_variables |= stream_variables(args, config.text.overlap_sites)
    if args.dry_run:
        refusal = config.shared_fusion_refusal(args.moe_a2a_backend)
        streams = plan_streams(args, refusal, config.text.overlap_sites, variables=plan.child_variables)
        plan.streams += streams.lines()
        plan.warnings += streams.warnings


def _plan_needs(plan: LaunchPlan) -> None:
    """Count the memory of a rank, once for all ranks; on a CPU only needed if experts exchange tokens."""
    plan.errors += mori_setting_problems(plan.args)
    if plan.errors or (plan.args.moe_a2a_backend == "none" and plan.platform == "cpu"):
        return
    from sglang.srt.model_executor.memory_plan import plan_needs

    assert plan.model_config is not None
    args = plan.args
    # The ranks of a launch check the release themselves; a dry run has no ranks.
    needs = plan_needs(args, plan.model_config, plan.platform, os.environ, check_release=args.dry_run)
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


def evaluate(
    request: ServerArgs | Parsed, platform: Platform | None = None, environ: Mapping[str, str] | None = None
) -> LaunchPlan:
    """The plan for a command line that was read (or for constructed arguments), without what ranks need.

    ``platform`` and ``environ`` stand for the real ones. A model folder that cannot be used is one of the reasons
    against a launch; flags and variables are checked all the same. Of the folder only config.json and
    generation_config.json are read, so a folder with them alone is enough.
    """
    if isinstance(request, ServerArgs):
        problems, args = check(request)
        request = Parsed(args, problems)
    plan = LaunchPlan(request.args, errors=list(request.errors), warnings=list(request.warnings))
    keys = find_keys(plan.args, environ)
    plan.args = replace(plan.args, **keys.values)
    plan.errors += keys.errors
    plan.warnings += keys.warnings
    platform = _choose_platform(platform, plan)
    report = check_environment(environ, platform.kind if platform else None)
    plan.errors += report.errors
    plan.warnings += report.warnings
    plan.variables = dict(report.set_variables)
    plan.args = _with_embedded_model(plan)
    plan.args = _with_cached_models(plan)
    model_problems = _read_model(plan, platform)
    if platform is not None:
        resolve(plan, platform, environ)
    plan.errors += [f"model: {problem}" for problem in model_problems]
    plan.errors = list(dict.fromkeys(plan.errors))
    return plan


def resolve(plan: LaunchPlan, platform: Platform, environ: Mapping[str, str] | None = None) -> None:
    """Run every step on the settings of ``plan``; problems are collected in it. ``environ``: default os.environ."""
    environ = os.environ if environ is None else environ
    asked, model = plan.args, plan.model_config
    plan.warnings += remarks(asked)
    given = frozenset(name for name, value in vars(asked).items() if value is not None)
    try:
        limit = envs.SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK.read(environ)
        topk = envs.SGLANG_OPT_C4_SPARSE_TOPK.read(environ)
        context = Context(platform, model, envs.SGLANG_MAMBA_SSM_DTYPE.read(environ), limit, topk, given)
    except EnvError as error:
        context = Context(platform, model, "", given=given)
        plan.errors.append(str(error))
    for step in STEPS:
        changes: dict[str, Any] = {}
        for outcome in step(plan.args, context):
            if isinstance(outcome, str):
                plan.errors.append(outcome)
            elif outcome.old != outcome.new:
                changes[outcome.field] = outcome.new
                plan.changes.append(outcome)
        plan.args = replace(plan.args, **changes)
    try:
        plan.warnings += without_effect(Situation(asked, plan.args, model, platform, environ))
    except EnvError as error:
        plan.errors.append(str(error))


def _choose_platform(platform: Platform | None, plan: LaunchPlan) -> Platform | None:
    if platform is None:
        from sglang.srt.platforms import PlatformError, current_platform

        try:
            plan.platform = current_platform.kind
        except PlatformError as error:
            plan.errors.append(str(error))
            return None
        except EnvError:
            return None  # the check of the environment reports the variable
        return current_platform
    plan.platform = platform.kind
    return platform


def _with_embedded_model(plan: LaunchPlan) -> ServerArgs:
    """The arguments with the folder of a model that ships with the package, if it is named or no other is."""
    from sglang.embedded_models import EMBEDDED_MODELS, default_model_path

    args, asked = plan.args, plan.args.model_path
    if asked and (asked not in EMBEDDED_MODELS or Path(asked).exists()):
        return args
    path = EMBEDDED_MODELS.get(asked, default_model_path())
    reason = "the model of this name" if asked else "no --model-path: the model"
    changes = [Change("model_path", asked, str(path), f"{reason} that ships with the package")]
    if args.served_model_name is None:
        changes.append(Change("served_model_name", None, path.name, "its name"))
    plan.changes += changes
    return replace(args, **{change.field: change.new for change in changes})


def _with_cached_models(plan: LaunchPlan) -> ServerArgs:
    """The arguments with folders of the local Hugging Face cache for the ids of models that it has."""
    args, changes = plan.args, []
    for field_name in ("model_path", "tokenizer_path", "speculative_draft_model_path"):
        asked = getattr(args, field_name)
        if asked is None or not is_model_id(asked):
            continue
        revision = args.revision if field_name == "model_path" else None
        folder = cached_folder(asked, revision)
        if folder is not None:
            changes.append(Change(field_name, asked, folder, "in the local Hugging Face cache"))
            if field_name == "model_path" and args.served_model_name is None:
                changes.append(Change("served_model_name", None, asked, "its id"))
        elif field_name != "model_path" or revision is not None:
            flag = f"--{field_name.replace('_', '-')}"
            of = "" if revision is None else f" at revision {revision!r}"
            plan.errors.append(
                f"{flag} {asked!r} is not a folder, and not in the local Hugging Face cache{of}: "
                f"`{download_line(asked, revision)}` puts it there"
            )
    if args.revision is not None and not is_model_id(args.model_path):
        plan.warnings.append("--revision has no effect: the model is a folder, which has none")
    plan.changes += changes
    return replace(args, **{change.field: change.new for change in changes})


def _read_model(plan: LaunchPlan, platform: Platform | None) -> list[str]:
    """Read the model's config into ``plan``; returns what is wrong with it."""
    from sglang.srt.arg_groups.model_config import read_model_config
    from sglang.srt.configs.errors import ConfigError

    args = plan.args
    try:
        usable = isinstance(args.model_overrides(), dict)
    except ValueError:
        usable = False
    if not usable:  # which the check of the settings reports
        args = replace(args, json_model_override_args="{}")
    try:
        kind = platform.kind if platform else "cpu"
        plan.model_config = read_model_config(args, kind, use_generation_defaults=args.sampling_defaults == "model")
    except ConfigError as error:
        where = f"{error.source}: " if error.source else ""
        return [where + problem for problem in error.problems]
    folder = Path(args.model_path)
    if args.load_format != "dummy" and not any(folder.glob("*.safetensors")):
        plan.warnings.append(f"{folder} contains no *.safetensors file: the launch needs them, or --load-format dummy")
    if not args.skip_tokenizer_init and not (Path(args.tokenizer_path or folder) / "tokenizer.json").is_file():
        plan.warnings.append(
            f"{args.tokenizer_path or folder} contains no tokenizer.json: the launch needs it, or --skip-tokenizer-init"
        )
    if args.skip_tokenizer_init and (args.reasoning_parser or args.tool_call_parser):
        return ["--reasoning-parser and --tool-call-parser read text, and --skip-tokenizer-init makes none"]
    if not args.skip_tokenizer_init and args.chat_template and not Path(args.chat_template).is_file():
        return [f"--chat-template {args.chat_template!r}: no such file"]
    return []

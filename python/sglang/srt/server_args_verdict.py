"""What a launch with given flags, variables and model folder would come to, decided before any process starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sglang.srt import server_args as flags
from sglang.srt.configs.hub_cache import cached_folder, download_line, is_model_id
from sglang.srt.environ import EnvError, check_environment
from sglang.srt.server_args_keys import with_keys
from sglang.srt.server_args_parser import parse_command_line
from sglang.srt.server_args_resolve import Change, PlatformLike, check, resolve_all
from sglang.srt.utils.network import PortError, bind

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs


@dataclass
class Verdict:
    """Accepted when ``errors`` is empty; ``args`` are then resolved and ``model_config`` is read.

    ``changes`` says what resolution set and why; ``variables`` are the environment variables that are set, secrets
    redacted. ``child_variables`` are those that the launch sets for the processes of the ranks; ``needed`` is
    what each of them is told of its memory (bytes by purpose), empty where the ranks do not ask. Problems of the model
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
    # What a dry run says of shared experts and of places that may overlap.
    streams: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The verdict for people: one line on the outcome, then a line each."""
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


def evaluate(
    argv: Sequence[str] | ServerArgs, platform: PlatformLike | None = None, environ: Mapping[str, str] | None = None
) -> Verdict:
    """The verdict on a command line (or on constructed arguments), on ``platform`` and ``environ`` or the real ones.

    A model folder that cannot be used is one of the reasons; flags and variables are judged all the same. Of the
    folder only config.json and generation_config.json are read, so a folder with them alone is enough.
    """
    verdict = _read_flags(argv)
    keys = with_keys(verdict.args, environ)
    verdict.args = keys.args
    verdict.errors += keys.errors
    verdict.warnings += keys.warnings
    platform = _choose_platform(platform, verdict)
    report = check_environment(environ, platform.kind if platform else None)
    verdict.errors += report.errors
    verdict.warnings += report.warnings
    verdict.variables = dict(report.set_variables)
    verdict.args = _with_embedded_model(verdict)
    verdict.args = _with_cached_models(verdict)
    model_problems = _read_model(verdict, platform)
    if platform is not None:
        resolution = resolve_all(verdict.args, verdict.model_config, platform, environ)
        verdict.args = resolution.args
        verdict.changes += resolution.changes
        verdict.errors += resolution.errors
        verdict.warnings += resolution.warnings
    verdict.errors += [f"model: {problem}" for problem in model_problems]
    verdict.errors = list(dict.fromkeys(verdict.errors))
    return verdict


def early_errors(argv: Sequence[str]) -> list[str]:
    """What is wrong with flags and variables, or else with the port; loads no torch.

    A dry run has none: its own verdict is whole. ``--help`` and ``--version`` print and exit.
    """
    verdict = _read_flags(argv)
    if verdict.args.dry_run:
        return []
    if errors := [*verdict.errors, *check_environment().errors]:
        return errors
    try:
        bind(verdict.args.host, verdict.args.port).close()
    except PortError as error:
        return [str(error)]
    return []


def flag_errors(argv: Sequence[str]) -> list[str]:
    """What is wrong with the flags alone; loads no torch."""
    return _read_flags(argv).errors


def _read_flags(argv: Sequence[str] | ServerArgs) -> Verdict:
    """The settings as given, unusable ones back at their defaults, and what can be said of them alone."""
    if isinstance(argv, flags.ServerArgs):
        problems, args = check(argv, flags.specs())
        return Verdict(args, errors=problems)
    parsed = parse_command_line(argv, flags.specs(), flags.DESCRIPTION)
    problems, args = check(flags.ServerArgs(**parsed.values), flags.specs())
    return Verdict(args, errors=[*parsed.errors, *problems], warnings=parsed.warnings)


def _choose_platform(platform: PlatformLike | None, verdict: Verdict) -> PlatformLike | None:
    if platform is None:
        from sglang.srt.platforms import PlatformError, current_platform

        try:
            verdict.platform = current_platform.kind
        except PlatformError as error:
            verdict.errors.append(str(error))
            return None
        except EnvError:
            return None  # the check of the environment reports the variable
        return current_platform
    verdict.platform = platform.kind
    return platform


def _with_embedded_model(verdict: Verdict) -> ServerArgs:
    """The arguments with the folder of a model that ships with the package, if it is named or no other is."""
    from sglang.embedded_models import EMBEDDED_MODELS, default_model_path

    args, asked = verdict.args, verdict.args.model_path
    if asked and (asked not in EMBEDDED_MODELS or Path(asked).exists()):
        return args
    path = EMBEDDED_MODELS.get(asked, default_model_path())
    reason = "the model of this name" if asked else "no --model-path: the model"
    changes = [Change("model_path", asked, str(path), f"{reason} that ships with the package")]
    if args.served_model_name is None:
        changes.append(Change("served_model_name", None, path.name, "its name"))
    verdict.changes += changes
    return replace(args, **{change.field: change.new for change in changes})


def _with_cached_models(verdict: Verdict) -> ServerArgs:
    """The arguments with folders of the local Hugging Face cache for the ids of models that it has."""
    args, changes = verdict.args, []
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
            verdict.errors.append(
                f"{flag} {asked!r} is no folder, and not in the local Hugging Face cache{of}: "
                f"`{download_line(asked, revision)}` puts it there"
            )
    if args.revision is not None and not is_model_id(args.model_path):
        verdict.warnings.append("--revision has no effect: the model is a folder, which has none")
    verdict.changes += changes
    return replace(args, **{change.field: change.new for change in changes})


def _read_model(verdict: Verdict, platform: PlatformLike | None) -> list[str]:
    """Read the model's config into ``verdict``; returns what is wrong with it."""
    from sglang.srt.configs.errors import ConfigError
    from sglang.srt.configs.model_config import ModelConfig

    args = verdict.args
    try:
        overrides = args.model_overrides()
    except ValueError:
        overrides = {}  # reported by check
    try:
        verdict.model_config = ModelConfig.from_path(
            args.model_path,
            json_model_override_args=overrides if isinstance(overrides, dict) else {},
            context_length=args.context_length,
            dtype=args.dtype,
            quantization=args.quantization,
            dequantize_mxfp4=args.dequantize_mxfp4,
            kv_cache_dtype=args.kv_cache_dtype,
            platform_kind=platform.kind if platform else "cpu",
            use_generation_defaults=args.sampling_defaults == "model",
        )
    except ConfigError as error:
        where = f"{error.source}: " if error.source else ""
        return [where + problem for problem in error.problems]
    folder = Path(args.model_path)
    if args.load_format != "dummy" and not any(folder.glob("*.safetensors")):
        verdict.warnings.append(f"{folder} holds no *.safetensors file: the launch needs them, or --load-format dummy")
    if not args.skip_tokenizer_init and not (Path(args.tokenizer_path or folder) / "tokenizer.json").is_file():
        verdict.warnings.append(
            f"{args.tokenizer_path or folder} holds no tokenizer.json: the launch needs it, or --skip-tokenizer-init"
        )
    if args.skip_tokenizer_init and (args.reasoning_parser or args.tool_call_parser):
        return ["--reasoning-parser and --tool-call-parser read text, and --skip-tokenizer-init makes none"]
    if not args.skip_tokenizer_init and args.chat_template and not Path(args.chat_template).is_file():
        return [f"--chat-template {args.chat_template!r}: no such file"]
    return []

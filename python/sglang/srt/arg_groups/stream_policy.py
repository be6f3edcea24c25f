"""Which places of the models may overlap on a second stream, which steps fuse shared experts instead, and why.

Decided once, from platform, variables, flags and measurements.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from sglang.srt.environ import EnvBool, EnvError, envs
from sglang.srt.platforms import Platform, current_platform
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.multi_stream_utils import FUSED, OVERLAP, SERIAL, OverlapSite
from sglang.srt.utils.shared_modes import MEASURED, ModeTimes, choose_modes

# The sites of a model share one stream, and no fork stands within another: of all sites one side runs at once.
SIDE_STREAM = "side"
NOT_MEASURED = "range not measured"


@dataclass(frozen=True)
class SiteRule:
    """One place that can overlap: where it does unasked, which variables ask for it elsewhere, and its range of tokens.

    shared_experts: the side is the shared experts, which fusion computes as routed ones. measured: device and date of
    the measurement behind the range, which binds on the kind ``measured_on`` alone.
    """

    name: str
    on_kinds: frozenset[str]
    switches: tuple[EnvBool, ...]
    shared_experts: bool = False
    max_tokens: int | None = None
    min_tokens: int = 1
    measured: str = NOT_MEASURED
    measured_on: str = "cuda"
    # Why the site is off unasked on a kind where upstream has it on.
    off_because: str = ""
    # A variable that is on unless set otherwise, and without which the site is off.
    off_switch: EnvBool | None = None


# The kinds on which upstream overlaps without being asked; a switch adds to them and never takes away.
DEFAULT_ON_KINDS = frozenset({"cuda"})
_H200 = "range measured on one H200, torch 2.11.0, triton 3.6.0, 2026-11-22, bench_shared_experts.py, Qwen3.5"
SITE_RULES = (
    # TPOT of V2-Lite with it over without: 0.92 at 1 token, 0.94 at 8, 0.96 at 32 and 64, 1.00 at 128. V3's MoE block
    # over two GPUs, which both sides fill with reads: 1.003 at 1 and 8 tokens, 0.992 at 64, 1.010 at 256.
    SiteRule(
        "deepseek.shared_experts", DEFAULT_ON_KINDS, (envs.SGLANG_ROCM_USE_MULTI_STREAM,), shared_experts=True,
        max_tokens=64,
        measured="range measured on H200, torch 2.11.0, triton 3.6.0, 2026-11-22 (bench_shared_experts, two_gpu/speed)",
    ),
    SiteRule("qwen3_5.shared_experts", DEFAULT_ON_KINDS, (envs.SGLANG_ALT_STREAM,), shared_experts=True),
    # TPOT with it over without: 0.975 at 1 token, 0.983 at 8, 0.993 at 32, 1.008 at 128. One token is another 0.975 of
    # that with both products and the norm ahead of them in one launch (bench_step.py, 2026-11-30).
    SiteRule(
        "qwen3_5.gdn_qkvz_ba", DEFAULT_ON_KINDS, (envs.SGLANG_ALT_STREAM, envs.SGLANG_GDN_QKVZ_BA_ALT_STREAM),
        max_tokens=32, min_tokens=2, measured=_H200,
    ),
    # 1.016, 1.004, 1.000, 1.008 at the same sizes. bench_shared_experts.py --modes fused fused+qk_norm measures it.
    SiteRule(
        "qwen3_5.qk_norm", frozenset(), (envs.SGLANG_ALT_STREAM, envs.SGLANG_QK_NORM_ALT_STREAM), measured=_H200,
        off_because="upstream has it on for CUDA; on one H200 it loses up to 1.6 % of a decode step to the one launch "
        "that norms, rotates and stores q and k",
    ),
    # A step of V4-Flash's sizes with it over without: 0.990 at 1 token; at 8, 32 and 64 within what other experts that
    # are touched change. On gfx942 a second capture with side streams faulted (vLLM 57288), so ROCm has to ask.
    SiteRule(
        "deepseek_v4.compression", DEFAULT_ON_KINDS, (envs.SGLANG_ROCM_USE_MULTI_STREAM,), max_tokens=1,
        measured="range measured on one H200, torch 2.11.0, triton 3.6.0, 2026-11-30 (bench_step, V4-Flash's sizes)",
        off_switch=envs.SGLANG_OPT_USE_MULTI_STREAM_OVERLAP,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class StreamSettings:
    """What the environment says of streams.

    asked: the variables that are on. switched_off: those that are on by default, and are off. forced: site -> on or
    off, for measurements. queues: the platform's bound on hardware queues as text, "" if unset. copy_engines: MORI
    copies by SDMA.
    """

    asked: frozenset[str] = frozenset()
    switched_off: frozenset[str] = frozenset()
    forced: Mapping[str, bool] = field(default_factory=dict)
    queues: str = ""
    copy_engines: bool = False

    @classmethod
    def from_env(cls, platform: Platform, environ: Mapping[str, str] | None = None) -> StreamSettings:
        """Read ``environ`` (default: os.environ); raises EnvError for a value that cannot be used."""
        environ = os.environ if environ is None else environ
        switches = {switch for rule in SITE_RULES for switch in rule.switches}
        off_switches = {rule.off_switch for rule in SITE_RULES if rule.off_switch is not None}
        variable = platform.queue_variable
        return cls(
            asked=frozenset(switch.name for switch in switches if switch.read(environ)),
            switched_off=frozenset(switch.name for switch in off_switches if not switch.read(environ)),
            forced=parse_sites(envs.SGLANG_STREAM_SITES.read(environ)),
            queues=environ.get(variable[0], "").strip() if variable else "",
            copy_engines=environ.get("MORI_ENABLE_SDMA", "").strip().lower() in ("1", "true", "on", "yes"),
        )


def parse_sites(text: str) -> dict[str, bool]:
    """ "site=on,site=off" as a mapping; raises EnvError for a malformed entry or an unknown site."""
    known = [rule.name for rule in SITE_RULES]
    forced = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, state = (piece.strip() for piece in entry.partition("="))
        if name not in known or state not in ("on", "off"):
            raise EnvError(
                f"SGLANG_STREAM_SITES takes comma-separated site=on or site=off, got {entry!r}; sites: "
                + ", ".join(known)
            )
        forced[name] = state == "on"
    return forced


@dataclass(frozen=True)
class QueuePlan:
    """The variable that bounds hardware queues, who wants one, and how many it gives (None: it is no number)."""

    variable: str
    streams: tuple[str, ...]
    available: int | None
    is_set: bool

    @property
    def needed(self) -> int:
        return len(self.streams)

    @property
    def is_short(self) -> bool:
        return self.available is None or self.available < self.needed


@dataclass(frozen=True)
class FusionChoice:
    """Whether shared experts may be computed as routed ones, and why; ``enforced``: at every size."""

    enabled: bool = False
    reason: str = "default"
    enforced: bool = False


@dataclass(frozen=True)
class StreamPlan:
    """The decision for every site, what it needs of the platform, and what a user should know of it."""

    sites: tuple[OverlapSite, ...]
    queues: QueuePlan | None = None
    warnings: tuple[str, ...] = ()
    fusion: FusionChoice = FusionChoice()

    def site(self, name: str) -> OverlapSite:
        """The decision for site ``name``, off if not planned for; raises KeyError for one that has no rule."""
        return {site.name: site for site in (*NO_OVERLAP.sites, *self.sites)}[name]

    def side_stream(self, *names: str) -> torch.cuda.Stream | None:
        """A stream that the sites ``names`` of one model share; None when none of them overlaps."""
        return current_platform.create_stream() if any(self.site(name).enabled for name in names) else None

    def child_variables(self) -> dict[str, str]:
        """What must be in the environment of a process before it touches the device."""
        if self.queues is None or self.queues.is_set or not self.queues.is_short:
            return {}
        return {self.queues.variable: str(self.queues.needed)}

    def lines(self) -> list[str]:
        """One line for fusion, and for each site that overlaps or was asked for."""
        fusion = f"shared-expert fusion: {'on' if self.fusion.enabled else 'off'} ({self.fusion.reason})"
        return [fusion] + [
            f"overlap {site.name}: {'on' if site.enabled else 'off'} ({site.reason})"
            for site in self.sites
            if site.enabled or site.reason != NOT_REQUESTED
        ]

    def describe(self) -> dict[str, Any]:
        """For /server_info."""
        modes = {site.name: [{"max_tokens": most, "mode": mode} for most, mode in site.modes] for site in self.sites}
        return {
            "sites": {site.name: {**asdict(site), "modes": modes[site.name]} for site in self.sites},
            "shared_expert_fusion": asdict(self.fusion),
            "hardware_queues": None if self.queues is None else {**asdict(self.queues), "needed": self.queues.needed},
            "warnings": list(self.warnings),
        }


NOT_REQUESTED = "not requested"
ALWAYS_FUSED = ((None, FUSED),)
# For models built without a plan: they fuse where their weights allow it.
NO_OVERLAP = StreamPlan(
    tuple(
        OverlapSite(rule.name, False, reason=NOT_REQUESTED, modes=ALWAYS_FUSED if rule.shared_experts else ())
        for rule in SITE_RULES
    )
)


def server_streams(args: ServerArgs) -> tuple[str, ...]:
    """The streams of a rank that may be busy at once, in addition to those of overlapping sites (sglang PR 24005 counts
    5 with a side stream, over several ranks with an all-to-all).
    """
    spread = args.moe_a2a_backend != "none"
    found = {
        "default": True,
        "graph capture": not args.disable_cuda_graph,
        "collectives": args.tp_size > args.attn_dp_size,
        "collectives between attention groups": args.attn_dp_size > 1 and not spread,
        "all-to-all": spread,
    }
    return tuple(name for name, is_there in found.items() if is_there)


def choose_fusion(args: ServerArgs, refusal: str = "", must_fuse: str = "") -> FusionChoice:
    """Whether steps may fuse, for a model with ``refusal`` against it; ``must_fuse``: why no step may do otherwise."""
    if refusal or args.disable_shared_experts_fusion:
        return FusionChoice(False, refusal or "--disable-shared-experts-fusion")
    if args.ep_size > 1 or args.attn_dp_size > 1:
        must_fuse = must_fuse or "each rank holds another part of routed than of shared experts"
    if args.enforce_shared_experts_fusion:
        must_fuse = must_fuse or "--enforce-shared-experts-fusion"
    return FusionChoice(True, must_fuse or "default", bool(must_fuse))


def plan_streams(
    args: ServerArgs,
    refusal: str = "",
    names: Collection[str] | None = None,
    must_fuse: str = "",
    platform: Any = current_platform,
    arch: str | None = None,
    variables: Mapping[str, str] | None = None,
) -> StreamPlan:
    """The plan of this process, from its platform, its environment and resolved ``args``.

    refusal: why this model's shared experts cannot be computed as routed ones; "" if they can. must_fuse: why they
    cannot be computed otherwise. names: the sites that the model has; None means all. arch None asks the device.
    variables: what a launch will add to the environment.
    """
    settings = StreamSettings.from_env(platform, {**os.environ, **(variables or {})})
    fusion = choose_fusion(args, refusal, must_fuse)
    return resolve_streams(platform, settings, args, fusion, names=names, arch=arch)


def stream_variables(
    args: ServerArgs, names: Collection[str] | None = None, platform: Any = current_platform
) -> dict[str, str]:
    """``child_variables`` enough for every site that may overlap: fusion is decided by the device, not touched here."""
    return resolve_streams(platform, StreamSettings.from_env(platform), args, names=names, arch="").child_variables()


def resolve_streams(
    platform: Platform,
    settings: StreamSettings,
    args: ServerArgs,
    fusion: FusionChoice = FusionChoice(),
    measured: Mapping[tuple[str, str], ModeTimes] = MEASURED,
    names: Collection[str] | None = None,
    arch: str | None = None,
) -> StreamPlan:
    """Decide the sites ``names`` (None: all); steps that fuse shared experts have nothing left to overlap."""
    sites, warnings = [], []
    rules = SITE_RULES if names is None else tuple(rule for rule in SITE_RULES if rule.name in names)
    for rule in rules:
        site = _decide(rule, platform, settings)
        if rule.shared_experts and fusion.enabled:
            device = platform.arch if arch is None else arch
            site = _choose(site, measured.get((rule.name, device)), fusion, device)
        # Between dispatch and combine the side has room in eager steps too (sglang PR 24005).
        over_ranks = rule.shared_experts and args.moe_a2a_backend != "none"
        sites.append(replace(site, capture_only=not over_ranks))
        asks = "SGLANG_STREAM_SITES" if settings.forced.get(rule.name) else rule.switches[0].name
        if site.modes and not site.enabled and (asks == "SGLANG_STREAM_SITES" or _asked(rule, platform, settings)):
            warnings.append(_fusion_warning(asks, rule, fusion))
        if site.enabled and rule.shared_experts and args.moe_a2a_backend == "mori" and platform.kind == "hip":
            warnings += all_to_all_warnings(rule.name, args.deepep_mode, settings)
    warnings += _without_effect(rules, platform, settings)
    queues = None
    if platform.queue_variable is not None and any(site.enabled for site in sites):
        (variable, default), text = platform.queue_variable, settings.queues
        available = default if not text else int(text) if text.isdecimal() else None
        queues = QueuePlan(variable, (*server_streams(args), SIDE_STREAM), available, is_set=bool(text))
        warnings += _queue_warnings(queues, settings)
    return StreamPlan(tuple(sites), queues, tuple(warnings), fusion)


def _fusion_warning(asks: str, rule: SiteRule, fusion: FusionChoice) -> str:
    because = f" for every step ({fusion.reason})" if fusion.enforced else ""
    return (
        f"{asks} asks for overlap of {rule.name}, but shared-expert fusion is on{because} and leaves nothing to "
        "overlap: add --disable-shared-experts-fusion, or unset the variable"
    )


def _without_effect(rules: Sequence[SiteRule], platform: Platform, settings: StreamSettings) -> list[str]:
    """Settings of streams that have no effect for a model with ``rules``, one line each."""
    found = []
    for name in sorted(settings.forced.keys() - {rule.name for rule in rules}):
        found.append(f"SGLANG_STREAM_SITES names {name}, a site that this model does not have: the entry has no effect")
    if any(settings.forced.values()) and not platform.supports_streams:
        found.append(f"SGLANG_STREAM_SITES has no effect: {_no_streams(platform)}")
    for switch in {switch.name: switch for rule in SITE_RULES for switch in rule.switches}.values():
        # The launch check says so of another platform's variables.
        if switch.name not in settings.asked or switch.platform not in ("", platform.kind):
            continue
        served = [rule for rule in rules if switch in rule.switches]
        if not served:
            found.append(f"{switch.name} has no effect: this model has none of the sites that it overlaps")
        elif not any(_asked(rule, platform, settings) for rule in served):
            missing = [_missing(rule, settings) for rule in served]
            found.append(f"{switch.name} has no effect without {' or '.join(dict.fromkeys(missing))}: set that too")
    return found


def _missing(rule: SiteRule, settings: StreamSettings) -> str:
    return " and ".join(switch.name for switch in rule.switches if switch.name not in settings.asked)


def _asked(rule: SiteRule, platform: Platform, settings: StreamSettings) -> bool:
    """True when the variables of this platform all ask for the site."""
    return all(switch.name in settings.asked and switch.platform in ("", platform.kind) for switch in rule.switches)


def _choose(site: OverlapSite, times: ModeTimes | None, fusion: FusionChoice, arch: str) -> OverlapSite:
    """``site`` with the mode of each size: fused, overlapping where the site may, or one after the other."""
    available = (FUSED,) if fusion.enforced else (FUSED, OVERLAP, SERIAL) if site.enabled else (FUSED, SERIAL)
    modes = choose_modes(available, times)
    evidence = f"measured: {times.where}" if times else f"not measured on {arch}"
    evidence = fusion.reason if fusion.enforced else evidence
    if modes == ALWAYS_FUSED:
        return replace(site, enabled=False, modes=modes, reason=f"shared experts are fused at every size ({evidence})")
    steps = ", ".join(f"{mode} {'beyond' if most is None else f'up to {most} tokens'}" for most, mode in modes)
    overlaps = site.enabled and any(mode == OVERLAP for _, mode in modes)
    asked = f"{site.reason}; " if overlaps else ""
    return replace(site, enabled=overlaps, modes=modes, reason=f"{asked}{steps} ({evidence})")


def _decide(rule: SiteRule, platform: Platform, settings: StreamSettings) -> OverlapSite:
    names = " and ".join(switch.name for switch in rule.switches)
    enabled, reason = False, NOT_REQUESTED
    if rule.name in settings.forced:
        enabled, reason = settings.forced[rule.name], "SGLANG_STREAM_SITES"
    elif rule.off_switch is not None and rule.off_switch.name in settings.switched_off:
        reason = f"{rule.off_switch.name} is off"
    elif platform.kind in rule.on_kinds:
        enabled, reason = True, f"default on {platform.kind}"
    elif _asked(rule, platform, settings):
        enabled, reason = True, names
    elif any(switch.name in settings.asked and switch.platform == platform.kind for switch in rule.switches[1:]):
        reason = f"needs {names}"
    elif rule.off_because and platform.kind == rule.measured_on:
        reason = rule.off_because
    if enabled and not platform.supports_streams:
        enabled, reason = False, _no_streams(platform)
    known = platform.kind == rule.measured_on
    if enabled:
        reason += f"; {rule.measured if known else NOT_MEASURED}"
    most, least = (rule.max_tokens, rule.min_tokens) if known else (None, 1)
    return OverlapSite(rule.name, enabled, least, most, reason=reason)


def exchange_warnings(platform: Platform, deepep_mode: str) -> list[str]:
    """Warnings of MORI's dispatcher, where variables ask for shared experts that overlap its exchange."""
    if platform.kind != "hip":
        return []
    settings = StreamSettings.from_env(platform)
    asked = [r for r in SITE_RULES if r.shared_experts and settings.forced.get(r.name, _asked(r, platform, settings))]
    return [warning for rule in asked for warning in all_to_all_warnings(rule.name, deepep_mode, settings)]


def all_to_all_warnings(site: str, deepep_mode: str, settings: StreamSettings) -> list[str]:
    """Why overlap of ``site`` with MORI's exchange would gain nothing in ``deepep_mode``, and what to set."""
    if settings.copy_engines:  # which MORI's AsyncLL alone uses, whatever the mode
        return []
    if deepep_mode == "low_latency":
        return ["--deepep-mode low_latency copies by the compute units, slowly, unless MORI_ENABLE_SDMA=1 is set"]
    return [
        f"overlap of {site} with --moe-a2a-backend mori pays when dispatch and combine leave the compute units, "
        "that is under AsyncLL: add --deepep-mode low_latency (not auto, which means normal here) and set "
        "MORI_ENABLE_SDMA=1"
    ]


def _no_streams(platform: Platform) -> str:
    return f"platform {platform.kind} on {platform.device_type} has no streams"


def _queue_warnings(queues: QueuePlan, settings: StreamSettings) -> list[str]:
    if not queues.is_short:
        return []
    return [
        f"{queues.variable}={settings.queues or f'{queues.available} (its default)'} gives overlapping streams too "
        f"few hardware queues, so they take turns: set {queues.variable}={queues.needed} before the process starts "
        f"(sglang.launch_server does unless it is set); streams: {', '.join(queues.streams)}"
    ]

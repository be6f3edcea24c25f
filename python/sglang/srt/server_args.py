"""The server's settings: one frozen dataclass whose annotated fields are the flags.

``prepare_server_args`` reads a command line, ``resolve`` fills what depends on model and machine, and ``evaluate`` does
all of it and collects every problem. Importing this module loads no torch, and constructing ServerArgs touches no disk.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from sglang.srt.configs.attention_backends import attention_backend_names
from sglang.srt.server_args_fields import Arg, FieldSpec, field_specs
from sglang.srt.server_args_http import ADMISSION, API, HTTP, LOGGING, HttpArgs
from sglang.srt.server_args_parser import add_arguments, collect_values, parse_command_line, unknown_setting
from sglang.srt.server_args_resolve import PlatformLike, check, resolve_all
from sglang.srt.server_args_spec import SPECULATIVE, SpecArgs
from sglang.srt.server_args_upstream import ELSEWHERE, upstream_flags, verdicts

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args_verdict import Verdict

__all__ = [
    "ServerArgs",
    "ServerArgsError",
    "check_static",
    "evaluate",
    "exit_with_errors",
    "get_global_server_args",
    "override_server_args",
    "prepare_server_args",
    "resolve",
    "run_dry",
    "set_global_server_args_for_scheduler",
]

logger = logging.getLogger(__name__)

DESCRIPTION = "Serve a Mixture-of-Experts model over HTTP. Flags have upstream sglang's names; see also --dry-run."
MODEL = "Model and tokenizer"
DTYPE = "Quantization and data type"
MEMORY = "Memory and scheduling"
RUNTIME = "Runtime options"
PARALLEL = "Parallelism and multi-node"
KERNELS = "Kernel backend"
EXPERTS = "Expert parallelism"
LINEAR = "Mamba and linear attention"
GRAPHS = "Graphs and overlap"
# The order of groups in --help and in the documentation.
GROUPS = (
    MODEL,
    HTTP,
    ADMISSION,
    DTYPE,
    MEMORY,
    RUNTIME,
    LOGGING,
    API,
    PARALLEL,
    KERNELS,
    EXPERTS,
    SPECULATIVE,
    LINEAR,
    GRAPHS,
)


class ServerArgsError(ValueError):
    """Settings that cannot be used; ``errors`` holds each reason."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


@dataclass(frozen=True)
class ServerArgs(SpecArgs, HttpArgs):
    """All settings of a server. None means that ``resolve`` chooses; what stays None afterwards is optional."""

    model_path: Annotated[
        str,
        Arg(
            "Folder of a model in Hugging Face format, or an id such as `deepseek-ai/DeepSeek-V3` that the local "
            "Hugging Face cache has; nothing is fetched. Or one of the small models that ship with the package: "
            "deepseek-v3-tiny, deepseek-v2-tiny, qwen3.5-moe-tiny.",
            MODEL,
            aliases=("--model",),
            metavar="FOLDER",
            auto="deepseek-v3-tiny",
        ),
    ] = ""
    revision: Annotated[
        str | None,
        Arg("Branch, tag or commit of a model that is named by its id, as the cache has it.", MODEL, auto="main"),
    ] = None
    tokenizer_path: Annotated[
        str | None, Arg("Folder that holds tokenizer.json.", MODEL, auto="the model path", metavar="FOLDER")
    ] = None
    skip_tokenizer_init: Annotated[
        bool, Arg("Load no tokenizer: requests bring input_ids and get output ids, no text.", MODEL)
    ] = False
    load_format: Annotated[
        str,
        Arg(
            "Where weights come from. auto and safetensors read the files of the folder; dummy makes random ones.",
            MODEL,
            choices=("auto", "safetensors", "dummy"),
            elsewhere=ELSEWHERE["load_format"],
        ),
    ] = "auto"
    context_length: Annotated[
        int | None,
        Arg("Most tokens of prompt and output of a request.", MODEL, minimum=1, human=True, auto="the model's limit"),
    ] = None
    json_model_override_args: Annotated[
        str, Arg("JSON object laid over the model's config.json, such as '{\"num_hidden_layers\": 4}'.", MODEL)
    ] = "{}"
    dtype: Annotated[
        str,
        Arg(
            "Type of weights and activations. auto is the checkpoint's type, and float32 on CPU. half is float16, and "
            "float is float32.",
            DTYPE,
            choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
        ),
    ] = "auto"
    quantization: Annotated[
        str | None,
        Arg(
            "fp8 turns matrices into 8-bit floats in 128x128 blocks as they load. Checkpoints in fp8 and of Quark need "
            "no flag.",
            DTYPE,
            choices=("fp8", "quark"),
            elsewhere=ELSEWHERE["quantization"],
            auto="the checkpoint's format",
        ),  # fmt: skip
    ] = None
    dequantize_mxfp4: Annotated[
        bool,
        Arg(
            "Experts in MXFP4 become plain as they load, and take four times the memory; without, they keep four bits.",
            DTYPE,
        ),  # fmt: skip
    ] = False
    kv_cache_dtype: Annotated[
        str,
        Arg(
            "Type of cached keys, values and latents: auto is that of activations; fp8_e4m3 has 3 bits of fraction.",
            DTYPE,
            choices=("auto", "bfloat16", "fp8_e4m3"),
            elsewhere=("fp8_e5m2", "fp4_e2m1"),
        ),  # fmt: skip
    ] = "auto"
    mem_fraction_static: Annotated[
        float | None,
        Arg(
            "Share of the memory that is free after the weights are loaded which the KV and state pools may take.",
            MEMORY,
            above=0,
            below=1,
            auto="0.5 on CPU, else 0.88",
        ),
    ] = None
    max_running_requests: Annotated[
        int | None,
        Arg("Most requests that run at once, on each DP rank.", MEMORY, minimum=1, auto="64 on CPU, else 256"),
    ] = None
    max_total_tokens: Annotated[
        int | None,
        Arg("Tokens that the KV pool holds.", MEMORY, minimum=1, human=True, auto="what memory allows"),
    ] = None
    swa_full_tokens_ratio: Annotated[
        float | None,
        Arg(
            "Tokens that the pools of a sliding window hold, over those of the KV pool (DeepSeek V4).",
            MEMORY,
            above=0,
            maximum=1,
            auto="0.1, and what all running requests use if there is memory",
        ),
    ] = None
    chunked_prefill_size: Annotated[
        int | None,
        Arg(
            "Most prompt tokens in one step; a multiple of the page size. -1 never cuts a prompt. Attention groups "
            "divide it.",
            MEMORY,
            minimum=1,
            also=(-1,),
            auto="2048 on CPU, else 8192",
        ),
    ] = None
    max_prefill_tokens: Annotated[
        int, Arg("Most prompt tokens of all requests in one step.", MEMORY, minimum=1, human=True)
    ] = 16384
    schedule_policy: Annotated[
        str,
        Arg(
            "Order of waiting requests: fcfs by arrival, lpm by longest cached prefix.",
            MEMORY,
            choices=("fcfs", "lpm"),
            elsewhere=("random", "dfs-weight", "lof", "priority", "routing-key"),
        ),
    ] = "fcfs"
    schedule_conservativeness: Annotated[
        float, Arg("Raise it if requests are retracted often; lower admits more at once.", MEMORY, minimum=0)
    ] = 1.0
    page_size: Annotated[int | None, Arg("Tokens of a KV page.", MEMORY, minimum=1, auto="1")] = None
    disable_radix_cache: Annotated[bool, Arg("Keep no prefix for later requests.", MEMORY)] = False
    radix_eviction_policy: Annotated[
        str,
        Arg("What leaves a full prefix cache first.", MEMORY, choices=("lru",), elsewhere=("lfu", "slru", "priority")),
    ] = "lru"
    device: Annotated[
        str,
        Arg(
            "Where tensors live; ROCm is cuda too. auto takes a GPU when there is one.",
            RUNTIME,
            choices=("auto", "cpu", "cuda"),
            elsewhere=("xpu", "hpu", "npu", "musa", "mps"),
        ),
    ] = "auto"
    random_seed: Annotated[
        int | None, Arg("Seed of sampling and of dummy weights.", RUNTIME, minimum=0, auto="a random one, logged")
    ] = None
    stream_interval: Annotated[int, Arg("Tokens of one streamed chunk.", RUNTIME, minimum=1)] = 1
    incremental_streaming_output: Annotated[
        bool,
        Arg("Chunks of `/generate` carry only the new text, not all so far.", RUNTIME, aliases=("--stream-output",)),
    ] = False
    watchdog_timeout: Annotated[
        float, Arg("Seconds without progress of any process, hung or stopped, that end the server.", RUNTIME, minimum=3)
    ] = 300.0
    allow_auto_truncate: Annotated[
        bool, Arg("Cut prompts that exceed the context instead of refusing them.", RUNTIME)
    ] = False
    dry_run: Annotated[
        bool, Arg("Print what would be served and why, or every reason against it, and exit 0 or 2.", RUNTIME)
    ] = False
    tp_size: Annotated[
        int,
        Arg("Ranks that share each layer.", PARALLEL, aliases=("--tensor-parallel-size", "--tp"), minimum=1),
    ] = 1
    dp_size: Annotated[
        int,
        Arg(
            "Replicas of `--tp-size` ranks each; with `--enable-dp-attention`, attention groups among those ranks.",
            PARALLEL,
            aliases=("--data-parallel-size", "--dp"),
            minimum=1,
        ),
    ] = 1
    enable_dp_attention: Annotated[
        bool,
        Arg("Part the ranks into `--dp-size` groups that attend to different requests and share experts.", PARALLEL),
    ] = False
    load_balance_method: Annotated[
        str,
        Arg(
            "Which replica or attention group a request goes to: in turn, or the one with the fewest tokens to hold.",
            PARALLEL,
            choices=("auto", "round_robin", "total_tokens"),
            elsewhere=("total_requests", "follow_bootstrap_room", "shortest_queue", "minimum_tokens"),
        ),
    ] = "auto"
    nccl_port: Annotated[
        int | None, Arg("Local port where the ranks meet.", PARALLEL, minimum=1, maximum=65535, auto="a free one")
    ] = None
    dist_timeout: Annotated[int | None, Arg("Seconds that a collective may take.", PARALLEL, minimum=1, auto="600")] = (
        None
    )
    attention_backend: Annotated[
        str | None,
        Arg(
            "Implementation that attention prefers; triton and aiter need a GPU. In this build aiter becomes triton.",
            KERNELS,
            choices=attention_backend_names,
            elsewhere=ELSEWHERE["attention_backend"],
            auto="torch_native on CPU, else triton",
        ),
    ] = None
    sampling_backend: Annotated[
        str | None,
        Arg("Sampler.", KERNELS, choices=("pytorch",), elsewhere=("flashinfer", "ascend"), auto="pytorch"),
    ] = None
    ep_size: Annotated[
        int,
        Arg(
            "Parts into which the experts are split; divides `--tp-size`. `--moe-a2a-backend mori` makes it that.",
            EXPERTS,
            aliases=("--expert-parallel-size", "--ep"),
            minimum=1,
        ),
    ] = 1
    moe_a2a_backend: Annotated[
        str,
        Arg(
            "Token exchange between expert ranks: none sums over all, mori sends each token to the ranks it needs.",
            EXPERTS,
            choices=("none", "mori"),
            elsewhere=ELSEWHERE["moe_a2a_backend"],
        ),
    ] = "none"
    deepep_mode: Annotated[
        str,
        Arg(
            "Mode of DeepEP or MoriEP: normal for throughput, low_latency (AsyncLL with MoriEP) for small batches. "
            "With mori, auto is normal.",
            EXPERTS,
            choices=("auto", "normal", "low_latency"),
        ),
    ] = "auto"
    disable_shared_experts_fusion: Annotated[
        bool, Arg("Compute shared experts apart from the routed ones, never as slots of theirs.", EXPERTS)
    ] = False
    enforce_shared_experts_fusion: Annotated[
        bool, Arg("Compute shared experts as routed ones at every size; refuse to start where they cannot.", EXPERTS)
    ] = False
    mamba_ssm_dtype: Annotated[
        str | None,
        Arg(
            "Type of the recurrent state of linear-attention layers.",
            LINEAR,
            choices=("float32", "bfloat16", "float16"),
            auto="`SGLANG_MAMBA_SSM_DTYPE`, else the checkpoint's",
        ),
    ] = None
    max_mamba_cache_size: Annotated[
        int | None, Arg("Slots for recurrent states, of running requests and of cached prefixes.", LINEAR, minimum=1)
    ] = None
    disable_cuda_graph: Annotated[bool, Arg("Capture no graphs (HIP graphs neither).", GRAPHS)] = False
    cuda_graph_bs: Annotated[list[int] | None, Arg("Batch sizes to capture.", GRAPHS, minimum=1)] = None
    cuda_graph_max_bs: Annotated[int | None, Arg("Greatest batch size to capture.", GRAPHS, minimum=1)] = None
    disable_overlap_schedule: Annotated[
        bool, Arg("Prepare a step only after the one before it has ended, as on CPU always.", GRAPHS)
    ] = False
    enable_mixed_chunk: Annotated[bool, Arg("Let decoding requests join a step of prompt chunks.", GRAPHS)] = False

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> ServerArgs:
        """Construct from keywords as upstream's Engine takes them.

        A keyword of upstream that this engine lacks is treated as its flag would be. Raises ServerArgsError.
        """
        known = {spec.name for spec in specs()}
        values = {name: value for name, value in kwargs.items() if name in known}
        errors = []
        given = []
        for name, value in kwargs.items():
            if name in known or value is None or value is False:
                continue
            flag = upstream_flags().get("--" + name.replace("_", "-"))
            if flag is None:
                errors.append(unknown_setting(name, specs()))
            else:
                given.append((flag.names[0], [] if value is True else [str(value)]))
        refused, warnings = verdicts(given)
        if errors or refused:
            raise ServerArgsError(errors + refused)
        for warning in warnings:
            logger.warning("%s", warning)
        return cls(**values)

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Declare every flag on another program's parser; read the result with ``from_cli_args``."""
        add_arguments(parser, specs())

    @classmethod
    def from_cli_args(cls, namespace: argparse.Namespace) -> ServerArgs:
        """From a namespace of a parser that ``add_cli_args`` filled; raises ServerArgsError."""
        parsed = collect_values(namespace, specs())
        return _accepted(cls(**parsed.values), parsed.errors, parsed.warnings)

    @property
    def num_replicas(self) -> int:
        """Independent copies of the model, of ``tp_size`` ranks each."""
        return 1 if self.enable_dp_attention else self.dp_size

    @property
    def attn_dp_size(self) -> int:
        """Attention groups of one replica."""
        return self.dp_size if self.enable_dp_attention else 1

    def model_overrides(self) -> dict[str, Any]:
        """``json_model_override_args`` as a mapping."""
        overrides: dict[str, Any] = json.loads(self.json_model_override_args)
        return overrides

    def to_json(self) -> str:
        """All fields as JSON text, for a child process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServerArgs:
        """The ServerArgs whose ``to_json`` gave ``text``."""
        return cls(**json.loads(text))


@functools.cache
def specs() -> tuple[FieldSpec, ...]:
    """The flags, by group, and within a group in order of declaration."""
    return tuple(sorted(field_specs(ServerArgs), key=lambda spec: GROUPS.index(spec.arg.group)))


def prepare_server_args(argv: Sequence[str]) -> ServerArgs:
    """Read a command line (without the program's name); raises ServerArgsError with every problem.

    ``--help`` prints and exits. What depends on the model or the machine is left to ``resolve``.
    """
    parsed = parse_command_line(argv, specs(), DESCRIPTION)
    return _accepted(ServerArgs(**parsed.values), parsed.errors, parsed.warnings)


def _accepted(args: ServerArgs, errors: Sequence[str], warnings: Sequence[str]) -> ServerArgs:
    for warning in warnings:
        logger.warning("%s", warning)
    if problems := [*errors, *check_static(args)]:
        raise ServerArgsError(problems)
    return args


def check_static(args: ServerArgs) -> list[str]:
    """Problems that need neither model nor machine: types, choices, bounds, flags that exclude each other."""
    return check(args, specs())[0]


def resolve(args: ServerArgs, model_config: ModelConfig, platform: PlatformLike) -> ServerArgs:
    """Fill what depends on model and machine, logging each change; raises ServerArgsError with every problem.

    ``platform`` needs ``kind`` ("cpu", "cuda", "hip") and ``device_type``.
    """
    resolution = resolve_all(args, model_config, platform)
    for change in resolution.changes:
        logger.info("%s", change)
    for warning in resolution.warnings:
        logger.warning("%s", warning)
    if resolution.errors:
        raise ServerArgsError(resolution.errors)
    return resolution.args


def evaluate(
    argv: Sequence[str] | ServerArgs, platform: PlatformLike | None = None, environ: Mapping[str, str] | None = None
) -> Verdict:
    """Everything that can be known before a launch: flags, variables, model config and resolution in one verdict."""
    from sglang.srt.server_args_verdict import evaluate as evaluate_all

    return evaluate_all(argv, platform, environ)


def run_dry(argv: Sequence[str], platform: PlatformLike | None = None) -> int:
    """Print the verdict on a command line; returns the exit status: 0 if it would be served, else 2."""
    verdict = evaluate(argv, platform)
    print("\n".join(verdict.lines()))
    return 2 if verdict.errors else 0


def exit_with_errors(errors: Sequence[str]) -> None:
    """Print every problem to stderr and exit with status 2."""
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


_global_server_args: ServerArgs | None = None


def get_global_server_args() -> ServerArgs:
    """The resolved arguments of this process; raises RuntimeError before they are set."""
    if _global_server_args is None:
        raise RuntimeError("server arguments are not set in this process: set_global_server_args_for_scheduler first")
    return _global_server_args


def set_global_server_args_for_scheduler(args: ServerArgs) -> None:
    """Make ``args`` what ``get_global_server_args`` returns in this process."""
    global _global_server_args
    _global_server_args = args


@contextmanager
def override_server_args(**changes: Any) -> Iterator[ServerArgs]:
    """Within the block, the process's arguments (or the defaults) with ``changes``; for tests."""
    global _global_server_args
    previous = _global_server_args
    _global_server_args = replace(previous or ServerArgs(), **changes)
    try:
        yield _global_server_args
    finally:
        _global_server_args = previous

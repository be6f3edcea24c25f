"""The server's settings: one frozen dataclass whose annotated fields are the flags.

``prepare_server_args`` reads a command line, ``resolve`` fills what depends on model and machine, and ``evaluate`` does
all of it and collects every problem. Importing this module loads no torch, and constructing ServerArgs touches no disk.
"""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any

from sglang.srt.server_args_fields import Arg, FieldSpec, field_specs
from sglang.srt.server_args_parser import add_arguments, collect_values, lacking_flag, parse_command_line
from sglang.srt.server_args_upstream import verdicts

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args_resolve import PlatformLike
    from sglang.srt.server_args_verdict import Verdict

__all__ = [
    "ServerArgs",
    "ServerArgsError",
    "add_cli_args",
    "check_static",
    "evaluate",
    "exit_with_errors",
    "get_global_server_args",
    "override_server_args",
    "prepare_server_args",
    "render_markdown",
    "resolve",
    "run_dry",
    "set_global_server_args_for_scheduler",
]

logger = logging.getLogger(__name__)

DESCRIPTION = "Serve a Mixture-of-Experts model over HTTP. Flags have upstream sglang's names; see also --dry-run."
MODEL = "Model and tokenizer"
HTTP = "HTTP server"
DTYPE = "Quantization and data type"
MEMORY = "Memory and scheduling"
RUNTIME = "Runtime options"
LOGGING = "Logging"
API = "API related"
PARALLEL = "Parallelism and multi-node"
KERNELS = "Kernel backend"
EXPERTS = "Expert parallelism"
LINEAR = "Mamba and linear attention"
GRAPHS = "Graphs and overlap"

_ATTENTION_ELSEWHERE = (
    "flex_attention", "nsa", "dsv4", "compressed", "cutlass_mla", "fa3", "fa4", "flashinfer", "flashmla", "trtllm_mla",
    "tokenspeed_mla", "trtllm_mha", "dual_chunk_flash_attn", "wave", "intel_amx", "ascend", "intel_xpu",
)  # fmt: skip
_LOAD_FORMATS_ELSEWHERE = (
    "pt", "npcache", "sharded_state", "gguf", "bitsandbytes", "mistral", "layered", "flash_rl", "remote",
    "remote_instance", "fastsafetensors", "private", "runai_streamer",
)  # fmt: skip
_A2A_ELSEWHERE = ("deepep", "mooncake", "nixl", "ascend_fuseep", "flashinfer", "megamoe")


class ServerArgsError(ValueError):
    """Settings that cannot be used; ``errors`` holds each reason."""

    def __init__(self, errors: Sequence[str]) -> None:
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


@dataclass(frozen=True)
class ServerArgs:
    """All settings of a server. None means that ``resolve`` chooses; afterwards only optional things are None."""

    # fmt: off
    model_path: Annotated[str, Arg("Folder of a model in Hugging Face format. Nothing is fetched from a hub. Without it, the model that ships with the package is served.", MODEL, aliases=("--model",))] = ""
    # fmt: on

    @classmethod
    def from_kwargs(cls, **kwargs: Any) -> ServerArgs:
        """Construct from keywords as upstream's Engine takes them; raises ServerArgsError for what cannot be honoured."""
        raise NotImplementedError

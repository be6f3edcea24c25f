"""The settings of the device and of the process as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sglang.srt.arg_groups.fields import Arg

RUNTIME = "Runtime options"


@dataclass(frozen=True)
class RuntimeArgs:
    """The part of ``ServerArgs`` that says where and how the engine runs."""

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

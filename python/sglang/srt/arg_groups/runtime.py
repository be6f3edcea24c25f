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
            "Device type of tensors; for ROCm it is cuda too. auto uses a GPU if there is one.",
            RUNTIME,
            choices=("auto", "cpu", "cuda"),
            upstream_only=("xpu", "hpu", "npu", "musa", "mps"),
        ),
    ] = "auto"
    random_seed: Annotated[
        int | None, Arg("Seed of sampling and of dummy weights.", RUNTIME, minimum=0, auto="a random one, logged")
    ] = None
    stream_interval: Annotated[int, Arg("Tokens per streamed chunk.", RUNTIME, minimum=1)] = 1
    incremental_streaming_output: Annotated[
        bool,
        Arg("Chunks of `/generate` contain only the new text, not all so far.", RUNTIME, aliases=("--stream-output",)),
    ] = False
    watchdog_timeout: Annotated[
        float,
        Arg("Seconds without progress of any process after which the server ends.", RUNTIME, minimum=3),
    ] = 300.0
    allow_auto_truncate: Annotated[
        bool, Arg("Cut prompts that exceed the context instead of refusing them.", RUNTIME)
    ] = False
    dry_run: Annotated[
        bool, Arg("Print the resolved settings with reasons, or every error, and exit with status 0 or 2.", RUNTIME)
    ] = False

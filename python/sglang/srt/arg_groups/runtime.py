"""The settings of the device and of the process as a whole."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.arg_groups.fields import flag

RUNTIME = "Runtime options"


@dataclass(frozen=True)
class RuntimeArgs:
    """The part of ``ServerArgs`` that says where and how the engine runs."""

    device: str = flag(
        "auto",
        "Device type of tensors; for ROCm it is cuda too. auto uses a GPU if there is one.",
        RUNTIME,
        choices=("auto", "cpu", "cuda"),
        upstream_only=("xpu", "hpu", "npu", "musa", "mps"),
    )
    random_seed: int | None = flag(
        None, "Seed of sampling and of dummy weights.", RUNTIME, minimum=0, auto="a random one, logged"
    )
    stream_interval: int = flag(1, "Tokens per streamed chunk.", RUNTIME, minimum=1)
    incremental_streaming_output: bool = flag(
        False, "Chunks of `/generate` contain only the new text, not all so far.", RUNTIME, aliases=("--stream-output",)
    )
    watchdog_timeout: float = flag(
        300.0, "Seconds without progress of any process after which the server ends.", RUNTIME, minimum=3
    )
    allow_auto_truncate: bool = flag(
        False,
        "Cut prompts that exceed the context instead of refusing them, unless they are echoed or scored.",
        RUNTIME,
    )
    dry_run: bool = flag(
        False, "Print the resolved settings with reasons, or every error, and exit with status 0 or 2.", RUNTIME
    )

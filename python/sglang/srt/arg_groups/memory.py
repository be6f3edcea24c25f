"""The settings of memory, of the prefix cache and of scheduling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sglang.srt.arg_groups.fields import Arg

MEMORY = "Memory and scheduling"


@dataclass(frozen=True)
class MemoryArgs:
    """The part of ``ServerArgs`` that says how memory is divided, and which requests run."""

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
        Arg("Size of the KV pool in tokens.", MEMORY, minimum=1, human=True, auto="what memory allows"),
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
        int, Arg("Maximum number of prompt tokens of all requests in one step.", MEMORY, minimum=1, human=True)
    ] = 16384
    schedule_policy: Annotated[
        str,
        Arg(
            "Order of waiting requests: fcfs by arrival, lpm by longest cached prefix.",
            MEMORY,
            choices=("fcfs", "lpm"),
            upstream_only=("random", "dfs-weight", "lof", "priority", "routing-key"),
        ),
    ] = "fcfs"
    schedule_conservativeness: Annotated[
        float, Arg("Raise it if requests are retracted often; a lower value admits more at once.", MEMORY, minimum=0)
    ] = 1.0
    page_size: Annotated[int | None, Arg("Tokens of a KV page.", MEMORY, minimum=1, auto="1")] = None
    disable_radix_cache: Annotated[bool, Arg("Do not cache prefixes for later requests.", MEMORY)] = False
    radix_eviction_policy: Annotated[
        str,
        Arg(
            "Eviction order of the prefix cache.",
            MEMORY,
            choices=("lru",),
            upstream_only=("lfu", "slru", "priority"),
        ),
    ] = "lru"

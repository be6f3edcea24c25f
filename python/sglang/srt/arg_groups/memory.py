"""The settings of memory, of the prefix cache and of scheduling."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.arg_groups.fields import flag

MEMORY = "Memory and scheduling"


@dataclass(frozen=True)
class MemoryArgs:
    """The part of ``ServerArgs`` that says how memory is divided, and which requests run."""

    mem_fraction_static: float | None = flag(
        None,
        "Share of the memory that is free after the weights are loaded which the KV and state pools may take.",
        MEMORY,
        above=0,
        below=1,
        auto="0.5 on CPU, else 0.88",
    )
    max_running_requests: int | None = flag(
        None, "Most requests that run at once, on each DP rank.", MEMORY, minimum=1, auto="64 on CPU, else 256"
    )
    max_total_tokens: int | None = flag(
        None, "Size of the KV pool in tokens.", MEMORY, minimum=1, human=True, auto="what memory allows"
    )
    swa_full_tokens_ratio: float | None = flag(
        None,
        "Tokens that the pools of a sliding window hold, over those of the KV pool (DeepSeek V4).",
        MEMORY,
        above=0,
        maximum=1,
        auto="0.1, and what all running requests use if there is memory",
    )
    chunked_prefill_size: int | None = flag(
        None,
        "Most prompt tokens in one step; a multiple of the page size. -1 never cuts a prompt. Attention groups "
        "divide it.",
        MEMORY,
        minimum=1,
        also=(-1,),
        auto="2048 on CPU, else 8192",
    )
    max_prefill_tokens: int = flag(
        16384, "Maximum number of prompt tokens of all requests in one step.", MEMORY, minimum=1, human=True
    )
    schedule_policy: str = flag(
        "fcfs",
        "Order of waiting requests: fcfs by arrival, lpm by longest cached prefix.",
        MEMORY,
        choices=("fcfs", "lpm"),
        upstream_only=("random", "dfs-weight", "lof", "priority", "routing-key"),
    )
    schedule_conservativeness: float = flag(
        1.0, "Raise it if requests are retracted often; a lower value admits more at once.", MEMORY, minimum=0
    )
    page_size: int | None = flag(None, "Tokens of a KV page.", MEMORY, minimum=1, auto="1")
    disable_radix_cache: bool = flag(False, "Do not cache prefixes for later requests.", MEMORY)
    radix_eviction_policy: str = flag(
        "lru",
        "Eviction order of the prefix cache.",
        MEMORY,
        choices=("lru",),
        upstream_only=("lfu", "slru", "priority"),
    )

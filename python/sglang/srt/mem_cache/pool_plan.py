"""Divides the memory left after the weights between the units of a cache layout, with the arithmetic shown."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.configs.cache_layout import FULL, STATE, CacheLayout

_MAX_ROWS = 2**31 - 1  # slot ids are kept as int32
# Memory of recurrent states over that of KV, where a prefix tree holds both.
STATES_TO_KV = 0.9


class PoolPlanError(ValueError):
    """The pools that were asked for do not fit; the message spells the arithmetic out."""


@dataclass(frozen=True)
class PoolPlan:
    """Usable units of each kind (tokens in whole pages), and the plan in words for the log."""

    sizes: dict[str, int]
    lines: tuple[str, ...]


def plan_pool_sizes(
    *,
    available_bytes: int,
    layout: CacheLayout,
    max_running_requests: int,
    page_size: int = 1,
    request_table_bytes: int = 0,
    max_total_tokens: int | None = None,
    max_mamba_cache_size: int | None = None,
    disable_radix_cache: bool = False,
    useful_tokens: int | None = None,
    useful_state_slots: int | None = None,
) -> PoolPlan:
    """Size the pools of one rank for ``available_bytes``, of which the table of requests' slots takes its part first.

    A model without recurrent states gives everything to KV. A hybrid splits the memory
    states : KV = ``STATES_TO_KV`` : 1; its slots are one live slot for each running request, and the rest the prefix
    tree's. Without a prefix tree there are only live slots. The overrides fix a number instead (the settings'
    resolution gives each running request a state slot); the useful numbers are where more memory would never be used,
    and bound what is chosen here. Each pool also holds one dummy: a page of tokens, a state slot. Raises PoolPlanError
    when it does not fit.
    """
    page_bytes = layout.num_bytes(FULL, page_size)
    if min(page_bytes, page_size, max_running_requests) < 1:
        raise PoolPlanError(
            f"bytes of a page {page_bytes}, page_size {page_size} and max_running_requests {max_running_requests} must "
            "be positive"
        )
    lines = [f"memory for pools: {_size(available_bytes)}"]
    if request_table_bytes:
        _check_table(available_bytes, request_table_bytes, max_running_requests, 2 * page_bytes)
        available_bytes -= request_table_bytes
        lines.append(f"request table: {_size(request_table_bytes)}, which leaves {_size(available_bytes)}")
    sizes = {}
    left = available_bytes
    if layout.has(STATE):
        slot_bytes = layout.num_bytes(STATE, 1)
        num_slots = _plan_states(
            available_bytes,
            slot_bytes,
            max_running_requests,
            max_mamba_cache_size,
            disable_radix_cache,
            useful_state_slots,
        )
        sizes[STATE] = num_slots
        left -= (num_slots + 1) * slot_bytes
        lines.append(
            f"states: {num_slots} slots ({max_running_requests} live, {num_slots - max_running_requests} "
            f"for the prefix tree) + 1 dummy x {_size(slot_bytes)}{_parts(layout)} = "
            f"{_size((num_slots + 1) * slot_bytes)}"
        )
    num_tokens = _plan_tokens(left, page_bytes, page_size, max_total_tokens, useful_tokens, lines)
    sizes[FULL] = num_tokens
    lines.append(
        f"KV: {num_tokens} tokens + 1 dummy page of {page_size} x {_size(page_bytes // page_size)} = "
        f"{_size((num_tokens // page_size + 1) * page_bytes)} of {_size(left)}"
    )
    return PoolPlan(sizes, tuple(lines))


def _parts(layout: CacheLayout) -> str:
    """What a state slot is made of, where that is several pools."""
    pools = [pool for pool in layout.pools if pool.unit == STATE]
    return f" ({' + '.join(f'{pool.name} {_size(pool.row_bytes)}' for pool in pools)})" if len(pools) > 1 else ""


def _check_table(available_bytes: int, table_bytes: int, max_running_requests: int, least: int) -> None:
    """Refuse a request table that leaves KV less than ``least`` bytes."""
    if available_bytes - table_bytes < least:
        raise PoolPlanError(
            f"the request table of {max_running_requests} requests (4 bytes for each position of the context of each) "
            f"takes {_size(table_bytes)} of the {_size(available_bytes)} there are for pools, and KV needs at least "
            f"{_size(least)}: lower --max-running-requests or --context-length, or free memory"
        )


def _plan_states(
    available_bytes: int,
    bytes_per_state_slot: int,
    max_running_requests: int,
    max_mamba_cache_size: int | None,
    disable_radix_cache: bool,
    useful: int | None,
) -> int:
    if max_mamba_cache_size is not None:
        slots = max_mamba_cache_size
    elif disable_radix_cache:
        slots = max_running_requests
    else:
        share = int(available_bytes * STATES_TO_KV / (1 + STATES_TO_KV))
        slots = max(share // bytes_per_state_slot - 1, max_running_requests)
        slots = slots if useful is None else min(slots, max(useful, max_running_requests))
    needed = (slots + 1) * bytes_per_state_slot
    if needed >= available_bytes:
        raise PoolPlanError(
            f"({slots} state slots + 1 dummy) x {_size(bytes_per_state_slot)} = {_size(needed)}, and only "
            f"{_size(available_bytes)} are there for states and KV: lower max_running_requests"
            f"{'' if max_mamba_cache_size is None else ' or max_mamba_cache_size'}, or free memory"
        )
    return slots


def _plan_tokens(
    left: int,
    page_bytes: int,
    page_size: int,
    max_total_tokens: int | None,
    useful: int | None,
    lines: list[str],
) -> int:
    fitting = (min(max(left, 0) // page_bytes, _MAX_ROWS // page_size) - 1) * page_size
    token = _size(page_bytes // page_size)
    if fitting < page_size:
        raise PoolPlanError(
            f"KV needs at least a page and the dummy page: 2 x {page_size} tokens x {token} = "
            f"{_size(2 * page_bytes)}, and {_size(left)} are left: free memory"
        )
    if max_total_tokens is None:
        return fitting if useful is None else min(fitting, max(useful + -useful % page_size, page_size))
    num_tokens = max_total_tokens - max_total_tokens % page_size
    if num_tokens < page_size:
        raise PoolPlanError(f"max_total_tokens {max_total_tokens} is less than one page of {page_size} tokens")
    if num_tokens > fitting:
        raise PoolPlanError(
            f"max_total_tokens {max_total_tokens}: ({num_tokens} + {page_size} dummy) x {token} = "
            f"{_size((num_tokens // page_size + 1) * page_bytes)}, and {_size(left)} are left, which fit {fitting} "
            "tokens: lower it or free memory"
        )
    if num_tokens != max_total_tokens:
        lines.append(f"max_total_tokens: {max_total_tokens} -> {num_tokens} (whole pages of {page_size})")
    return num_tokens


def _size(num_bytes: int) -> str:
    if abs(num_bytes) >= 1 << 30:
        return f"{num_bytes / (1 << 30):.2f} GiB"
    if abs(num_bytes) >= 1 << 20:
        return f"{num_bytes / (1 << 20):.2f} MiB"
    return f"{num_bytes} B"

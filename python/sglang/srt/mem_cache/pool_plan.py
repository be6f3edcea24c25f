"""Divides the memory left after the weights between the units of a cache layout, with the arithmetic shown."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from sglang.srt.configs.cache_layout import FULL, STATE, SWA, WINDOW_DUMMY_PAGES, CacheLayout, PoolSpec, dummy_units

_MAX_ROWS = 2**31 - 1  # slot ids are kept as int32
# Memory of recurrent states over that of KV, where a prefix tree holds both.
STATES_TO_KV = 0.9
# Tokens of a window's pools over those of KV, where nothing else is asked for.
SWA_FULL_TOKENS_RATIO = 0.1
# Pages of the window that a request holds at most while it decodes, and those with which any request can be served.
WINDOW_PAGES_PER_REQUEST, LEAST_WINDOW_PAGES = 3, 4


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
    swa_full_tokens_ratio: float | None = None,
    useful_step_tokens: int = 0,
) -> PoolPlan:
    """Size the pools of one rank for ``available_bytes``, of which the table of requests' slots takes its part first.

    A model without recurrent states gives everything to KV. A hybrid splits the memory
    states : KV = ``STATES_TO_KV`` : 1; its slots are one live slot for each running request, and the rest the prefix
    tree's. Without a prefix tree there are only live slots. A window's pools have ``swa_full_tokens_ratio`` times the
    tokens of KV; where none is given, ``SWA_FULL_TOKENS_RATIO`` and at least what all running requests and a step of
    ``useful_step_tokens`` use, if there is memory for it. The overrides fix a number instead (the settings' resolution
    gives each running request a state slot); the useful numbers are where more memory would never be used, and bound
    what is chosen here. Each pool also holds its dummies (``dummy_units``). Raises PoolPlanError when it does not fit.
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
    pages = _Pages(left, page_size, page_bytes, layout.num_bytes(SWA, page_size), swa_full_tokens_ratio)
    num_tokens = _plan_tokens(pages, max_total_tokens, useful_tokens, lines)
    sizes[FULL] = num_tokens
    lines.append(
        f"KV: {num_tokens} tokens + 1 dummy page of {page_size} x {_size(page_bytes // page_size)} = "
        f"{_size((num_tokens // page_size + 1) * page_bytes)} of {_size(left)}"
    )
    if layout.has(SWA):
        useful = WINDOW_PAGES_PER_REQUEST * max_running_requests + -(-useful_step_tokens // page_size)
        sizes[SWA] = _plan_window(pages, num_tokens // page_size, useful, lines) * page_size
    if len(layout.pools) > len(layout.units):
        lines += [_pool_line(pool, sizes[pool.unit] + dummy_units(pool.unit, page_size)) for pool in layout.pools]
    return PoolPlan(sizes, tuple(lines))


@dataclass(frozen=True)
class _Pages:
    """Memory that is left for pages of tokens, and bytes of each: of KV, and of the window (0: there is none).

    ratio: as asked for; None: nothing was.
    """

    left: int
    page_size: int
    full_bytes: int
    window_bytes: int
    ratio: float | None

    def windows(self, num_pages: int) -> int:
        """Pages of the window for so many pages of KV."""
        if not self.window_bytes:
            return 0
        asked = math.ceil((SWA_FULL_TOKENS_RATIO if self.ratio is None else self.ratio) * num_pages)
        return min(num_pages, asked if self.ratio is not None else max(asked, LEAST_WINDOW_PAGES))

    def cost(self, num_pages: int) -> int:
        """Bytes of so many pages of KV, with their windows and all dummies."""
        dummies = WINDOW_DUMMY_PAGES if self.window_bytes else 0
        return (num_pages + 1) * self.full_bytes + (self.windows(num_pages) + dummies) * self.window_bytes

    def fitting(self) -> int:
        """The most pages of KV that fit; below 1 for none."""
        most = min(max(self.left, 0) // self.full_bytes, _MAX_ROWS // self.page_size) - 1
        return bisect_right(range(most + 1), self.left, key=self.cost) - 1

    def terms(self, num_pages: int) -> str:
        """What is added for windows, in words; nothing where there are none."""
        if not self.window_bytes:
            return ""
        return f" + ({self.windows(num_pages)} + {WINDOW_DUMMY_PAGES}) window pages x {_size(self.window_bytes)}"


def _plan_window(pages: _Pages, num_pages: int, useful: int, lines: list[str]) -> int:
    """Pages of the window for ``num_pages`` of KV; the ``useful`` ones, where nothing was asked for and they fit."""
    windows = pages.windows(num_pages)
    if pages.ratio is None:
        spare = (pages.left - pages.cost(num_pages)) // pages.window_bytes
        windows = max(windows, min(useful, num_pages, windows + spare))
    least = min(LEAST_WINDOW_PAGES, num_pages)
    if windows < least:
        raise PoolPlanError(
            f"--swa-full-tokens-ratio {pages.ratio:g} of {num_pages * pages.page_size} tokens is a window pool of "
            f"{windows} pages of {pages.page_size}, and a request may need {least}: give at least "
            f"{math.ceil(1000 * least / num_pages) / 1000:g}, or raise --max-total-tokens"
        )
    lines.append(
        f"window: {windows * pages.page_size} tokens ({windows / num_pages:.3g} of KV) + {WINDOW_DUMMY_PAGES} pages of "
        f"{pages.page_size} for padding and tombstones x {_size(pages.window_bytes // pages.page_size)} = "
        f"{_size((windows + WINDOW_DUMMY_PAGES) * pages.window_bytes)}"
    )
    return windows


def _pool_line(pool: PoolSpec, num_units: int) -> str:
    rows = num_units // pool.units_per_row
    return f"pool {pool.name}: {rows} rows x {pool.row_bytes} B = {_size(rows * pool.row_bytes)}, by {pool.unit} units"


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


def _plan_tokens(pages: _Pages, max_total_tokens: int | None, useful: int | None, lines: list[str]) -> int:
    page_size, left = pages.page_size, pages.left
    fitting = pages.fitting() * page_size
    token = _size(pages.full_bytes // page_size)
    if fitting < page_size:
        raise PoolPlanError(
            f"KV needs at least a page and the dummy page: 2 x {page_size} tokens x {token}{pages.terms(1)} = "
            f"{_size(pages.cost(1))}, and {_size(left)} are left: free memory"
        )
    if max_total_tokens is None:
        return fitting if useful is None else min(fitting, max(useful + -useful % page_size, page_size))
    num_tokens = max_total_tokens - max_total_tokens % page_size
    if num_tokens < page_size:
        raise PoolPlanError(f"max_total_tokens {max_total_tokens} is less than one page of {page_size} tokens")
    if num_tokens > fitting:
        asked = num_tokens // page_size
        raise PoolPlanError(
            f"max_total_tokens {max_total_tokens}: ({num_tokens} + {page_size} dummy) x {token}{pages.terms(asked)} = "
            f"{_size(pages.cost(asked))}, and {_size(left)} are left, which fit {fitting} tokens: lower it or free "
            "memory"
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

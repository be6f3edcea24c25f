"""A plan of compressed attention compared with lengths on the host: for debugging, as it waits for the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sglang.srt.configs.cache_layout import TOMBSTONE_PAGE
from sglang.srt.configs.deepseek_v4_cache import PAGE_SIZE
from sglang.srt.layers.attention.deepseek_v4_planner import CompressedPlan, StepRows


class PlanError(AssertionError):
    """A step was planned to read or write rows that are not its own."""


def check_plan(plan: CompressedPlan, step: StepRows, window: int, rings: Mapping[int, int]) -> None:
    """Raise PlanError unless ``plan`` is one of ``step``; ``window`` and ``rings`` are those that it was made with."""
    lens, new, loc = (part.cpu().numpy() for part in (step.seq_lens, step.extend_lens, step.out_cache_loc))
    requests: np.ndarray = np.repeat(np.arange(len(lens)), new)[: len(loc)]
    ahead = np.concatenate([np.arange(count) for count in [0, *new]])[: len(loc)]
    positions = np.full(len(loc), -1)
    positions[: len(requests)] = (lens - new)[requests] + ahead
    positions[loc < PAGE_SIZE] = -1
    real = positions >= 0

    def hold(what: str, *conditions: np.ndarray) -> None:
        for condition in conditions:
            if not np.all(condition):
                raise PlanError(f"{what}: rows {np.flatnonzero(~condition.reshape(len(condition), -1).all(1))[:8]}")

    slots, stored = plan.window_slots.cpu().numpy(), plan.store_slots.cpu().numpy()
    seen = positions[:, None] - np.arange(window - 1, -1, -1)
    inside = (seen >= 0) & real[:, None]
    hold("a row sees its window, and padding nothing", (slots >= 0) == inside)
    hold("a slot of the window is at another place of its page", ~inside | (slots % PAGE_SIZE == seen % PAGE_SIZE))
    hold("a page was given back", ~inside | (slots // PAGE_SIZE != TOMBSTONE_PAGE))
    hold("a row of the window is stored elsewhere than it is read", stored == np.where(real, slots[:, -1], 0))
    owned = real.nonzero()[0]
    hold("a row is another request's", plan.requests.cpu().numpy()[owned] == requests[owned])
    pages = plan.page_table.cpu().numpy()[np.unique(requests[owned])]
    wanted = -(-lens[np.unique(requests[owned])] // PAGE_SIZE)
    hold("pages of a request", (pages > 0) == (np.arange(pages.shape[1]) < wanted[:, None]))
    for ratio, ring in rings.items():
        entries = plan.entries[ratio]
        hold(f"entries that rows see, ratio {ratio}", entries.visible.cpu().numpy() == (positions + 1) // ratio)
        closing = np.flatnonzero(real & ((positions + 1) % ratio == 0))
        rows, sources = entries.entry_rows.cpu().numpy(), entries.sources.cpu().numpy()
        used = np.arange(len(rows)) < len(closing)
        hold(f"an entry of ratio {ratio} goes elsewhere", rows[used] == loc[closing] // ratio, rows[~used] == 0)
        hold(f"an entry of ratio {ratio} is made of others", sources[used, -1] == closing, sources[~used] == -1)
        states = entries.state_rows.cpu().numpy()
        hold(f"states of ratio {ratio} in another page", (states == 0) | (states // ring == stored // PAGE_SIZE))

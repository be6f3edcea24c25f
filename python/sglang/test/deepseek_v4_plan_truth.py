"""Plans of compressed attention, token by token in Python, and random batches to compare them on."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from sglang.srt.configs.cache_layout import TOMBSTONE_PAGE
from sglang.srt.configs.deepseek_v4_cache import ENTRY_TOKENS, PAGE_SIZE, RINGS
from sglang.srt.layers.attention import deepseek_v4_plan_check
from sglang.srt.layers.attention.deepseek_v4_planner import CompressedPlan, StepRows, plan_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WINDOW = 128
CONTEXT = 1024
NUM_PAGES = 64


@dataclass(frozen=True)
class PlanBatch:
    """Requests that bring the positions of ``spans``, then ``padded`` requests of one row and ``extra`` rows of none.

    seed: where their pages are. rings: 0 for those without speculation, 1 with.
    """

    spans: list[tuple[int, int]]
    padded: int
    extra: int
    seed: int
    rings: int = 0


def random_batch(rng: random.Random, longest: int = 700) -> PlanBatch:
    """Prompts, chunks, decode and verify steps, ragged or uniform, padded or not."""
    width = rng.choice((0, 0, 1, 1, 2, 3, 9, 300))
    spans = []
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        new = width or rng.choice((1, 1, 2, 7, 64, 130, rng.randint(1, 300)))
        end = rng.choice((rng.randint(new, longest), rng.choice((128, 256, 512, 640)) + rng.randint(-5, 5)))
        spans.append((max(0, end - new), end))
    padding = rng.choice((0, 0, 1, 3))
    return PlanBatch(spans, padding, rng.choice((0, 0, 5)), rng.randrange(1 << 30), rng.randrange(2))


def check_plan(batch: PlanBatch, ratios: tuple[int, ...] = (4, 128)) -> CompressedPlan:
    """The device's plan of ``batch``, compared with that of a loop; the table lacks this step's own slots."""
    rng = random.Random(batch.seed)
    pages = rng.sample(range(1, NUM_PAGES), sum(-(-end // PAGE_SIZE) for _, end in batch.spans))
    slots = []
    for _, end in batch.spans:
        mine = [pages.pop() for _ in range(-(-end // PAGE_SIZE))]
        slots.append([mine[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(end)])
    order = rng.sample(range(12), len(slots))
    table = torch.randint(0, NUM_PAGES * PAGE_SIZE, (13, CONTEXT), dtype=torch.int32)
    table[12] = 0
    for row, (start, _), mine in zip(order, batch.spans, slots, strict=True):
        table[row, :start] = torch.tensor(mine[:start], dtype=torch.int32)
    loc = [slot for (start, _), mine in zip(batch.spans, slots, strict=True) for slot in mine[start:]]

    def column(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=DEVICE)

    step = StepRows(
        # Rows past the last request may hold any slot.
        out_cache_loc=column(loc + [7] * batch.padded + [300] * batch.extra),
        req_pool_indices=column(order + [12] * batch.padded),
        seq_lens=column([end for _, end in batch.spans] + [1] * batch.padded),
        extend_lens=column([end - start for start, end in batch.spans] + [1] * batch.padded),
    )
    rings = {ratio: RINGS[ratio][batch.rings] for ratio in ratios}
    # Pages after the windows of all rows, and of nobody, have none.
    windows = [0, *rng.sample(range(2, NUM_PAGES + 40), NUM_PAGES - 1)]
    read = {0}
    for (start, end), mine in zip(batch.spans, slots, strict=True):
        read |= {slot // PAGE_SIZE for slot in mine[max(0, start - max(WINDOW, 128) + 1) : end]}
    windows = [window if page in read else TOMBSTONE_PAGE for page, window in enumerate(windows)]
    window_pages = torch.tensor(windows, dtype=torch.int32, device=DEVICE)
    plan = plan_step(step, table.to(DEVICE), window_pages, CONTEXT, WINDOW, rings)
    own = [[windows[slot // PAGE_SIZE] * PAGE_SIZE + slot % PAGE_SIZE for slot in mine] for mine in slots]
    _compare(plan, batch, slots, own, rings)
    deepseek_v4_plan_check.check_plan(plan, step, WINDOW, rings)
    return plan


def _compare(
    plan: CompressedPlan, batch: PlanBatch, slots: list[list[int]], windows: list[list[int]], rings: dict[int, int]
) -> None:
    """AssertionError if a number of ``plan`` differs from that of a loop over the tokens.

    slots, windows: of every token of each request, where it is, and where its row of the window is.
    """
    padding = batch.padded + batch.extra
    num_rows = sum(end - start for start, end in batch.spans) + padding
    requests, seen, stored = [], [], []
    for request, (start, end) in enumerate(batch.spans):
        for p in range(start, end):
            requests.append(request)
            seen.append([windows[request][q] if q >= 0 else -1 for q in range(p - WINDOW + 1, p + 1)])
            stored.append(windows[request][p])
    _same(plan.requests[: len(requests)], requests)
    _same(plan.window_slots, seen + [[-1] * WINDOW] * padding)
    _same(plan.store_slots, stored + [0] * padding)
    assert all(slot // PAGE_SIZE != TOMBSTONE_PAGE for each in (*seen, stored) for slot in each), "a tombstone is read"
    tables = []
    for (_, end), mine in zip(batch.spans, slots, strict=True):
        tables.append([mine[p] // PAGE_SIZE if p < end else 0 for p in range(0, CONTEXT, PAGE_SIZE)])
    _same(plan.page_table, tables + [[0] * (CONTEXT // PAGE_SIZE)] * batch.padded)
    for ratio, ring in rings.items():
        visible: list[int] = []
        state_rows, closed = [], []
        for (start, end), mine, window in zip(batch.spans, slots, windows, strict=True):
            first = len(visible)
            for p in range(start, end):
                visible.append(len(range(ratio - 1, p + 1, ratio)))
                last_of_page = min(end, p - p % PAGE_SIZE + PAGE_SIZE)
                state_rows.append(_state(window[p], ring) if last_of_page - p <= ring else 0)
                if p % ratio == ratio - 1:
                    made_of = []
                    for q in range(p - ENTRY_TOKENS[ratio] + 1, p + 1):
                        earlier = -2 - _state(window[q], ring) if q >= 0 else -1
                        made_of.append(first + q - start if q >= start else earlier)
                    closed.append((mine[p] // ratio, p - ratio + 1, made_of))
        found = plan.entries[ratio]
        _same(found.visible, visible + [0] * padding)
        _same(found.state_rows, state_rows + [0] * padding)
        unused = found.sources.shape[0] - len(closed)
        assert unused >= 0 and found.sources.shape[0] <= num_rows
        _same(found.entry_rows, [row for row, _, _ in closed] + [0] * unused)
        _same(found.first_positions, [first for _, first, _ in closed] + [0] * unused)
        _same(found.sources, [made_of for _, _, made_of in closed] + [[-1] * ENTRY_TOKENS[ratio]] * unused)


def _state(slot: int, ring: int) -> int:
    return slot // PAGE_SIZE * ring + slot % PAGE_SIZE % ring


def _same(found: torch.Tensor, wanted: list) -> None:
    assert torch.equal(found.cpu().long(), torch.tensor(wanted, dtype=torch.int64).view(found.shape)), (found, wanted)

"""Inputs of sparse attention as layers of DeepSeek V4 have them, and their outputs by float64 over decoded rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sglang.kernels.ops.attention.packed_rows import load_rows, store_rows_torch
from sglang.test.cache_pools import make_pages

DIM, ROPE, WINDOW = 512, 64, 128
# Around the ends of blocks and of the window.
LENGTHS = (0, 1, 63, 64, 127, 128, 129)


@dataclass(frozen=True)
class SparseInputs:
    """Arguments of the op, and of each row the rows that it attends to, in float64."""

    name: str
    args: tuple[object, ...]
    attended: tuple[torch.Tensor, ...]

    def truth(self) -> torch.Tensor:
        """[N, H, D] float64."""
        q, sinks, scale = self.args[0], self.args[3], self.args[4]
        assert isinstance(q, torch.Tensor) and isinstance(sinks, torch.Tensor) and isinstance(scale, float)
        out = []
        for query, rows in zip(q.double(), self.attended, strict=True):
            scores = torch.cat((query @ rows.T * scale, sinks.double().unsqueeze(1)), dim=1)
            out.append(scores.softmax(1)[:, :-1] @ rows)
        return torch.stack(out) if out else q.double()


def sparse_inputs(
    heads: int,
    per_page: int,
    packed: torch.dtype | None,
    sink: float = 0.0,
    chosen: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    lengths: tuple[int, ...] = LENGTHS,
    seed: int = 0,
) -> SparseInputs:
    """A row for each length, of which as many entries are visible; holes of -1; NaN wherever no row may look.

    per_page: entries of a page, 64 or 2; 0 for a window alone. packed: the 8-bit float of the caches, None for plain.
    """
    generator = torch.Generator().manual_seed(seed)

    def cache(num_rows: int, page: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Rows of which the first page and every third are poison, as is what is before; and what rows hold."""
        rows = torch.randn(num_rows + 1, DIM, generator=generator).to(dtype)
        rows[0] = torch.nan
        rows = rows[1:]
        dead = torch.arange(num_rows) % 3 == 0
        dead[:page] = True
        rows[dead] = torch.nan
        if packed is None:
            return rows, None, rows.double()
        values, scales = make_pages(num_rows // page + 1, page, DIM, ROPE, packed)
        values.view(torch.uint8)[0], scales[0] = 255, 255
        pages = values[1:], scales[1:]
        store_rows_torch(rows, torch.arange(num_rows), *pages)
        # Poison of all bits, which no writer makes: a number of it shows even where its scale is not read.
        values.view(torch.uint8)[1:].flatten(0, 1)[dead] = 127
        return *pages, load_rows(*pages, torch.arange(num_rows), DIM).double()

    count = len(lengths)
    q = torch.randn(count, heads, DIM, generator=generator).to(dtype)
    sinks = sink + torch.randn(heads, generator=generator)
    window, window_scales, window_rows = cache(4 * 256, 256)
    # First and last rows of pages among them, none of them poison.
    live = torch.tensor([256, 511, 512, 767, 1022, *range(257, 1024)])
    live = live[live % 3 != 0]
    ids = torch.full((count, WINDOW), -1, dtype=torch.int32)
    seen = []
    for row, length in enumerate(lengths):
        some = live[torch.cat((torch.arange(4), 4 + torch.randperm(len(live) - 4, generator=generator)))]
        taken = some[: min(length, WINDOW)]
        places = torch.randperm(WINDOW, generator=generator)[: len(taken)]
        ids[row, places] = taken.to(torch.int32)
        seen.append(window_rows[taken])
    name = f"h{heads} p{per_page} {'plain' if packed is None else str(packed)[6:]} sink {sink} chosen {chosen}"
    args: tuple[object, ...] = (q, window, ids, sinks, DIM**-0.5, window_scales)
    if not per_page:
        return SparseInputs(name, args, tuple(seen))
    num_pages = 66 if per_page == 2 else 3
    entries, scales, entry_rows = cache((2 * num_pages + 1) * per_page, per_page)
    table = (torch.randperm(2 * num_pages, generator=generator) + 1).view(2, num_pages).to(torch.int32)
    requests = torch.arange(count) % 2
    visible = torch.tensor(lengths, dtype=torch.int32)
    numbers = torch.full((count, WINDOW + 1), -1, dtype=torch.int32)
    for row, length in enumerate(lengths):
        at = table[requests[row]].repeat_interleave(per_page) * per_page
        at = at + torch.arange(len(at)) % per_page
        if not chosen:
            # All that are visible: none of them may be poison.
            store_rows(entries, scales, at[:length].long(), generator)
            continue
        healthy = torch.nonzero(at % 3 != 0).flatten()
        some = healthy[torch.randperm(len(healthy), generator=generator)][:length].sort().values
        holes = torch.rand(length, generator=generator) < 0.3
        places = torch.arange(length)[~holes][: len(some)]
        numbers[row, places] = some[: len(places)].to(torch.int32)
        seen[row] = torch.cat((seen[row], entry_rows[at[some[: len(places)]].long()]))
    if not chosen:
        everything = torch.arange(entries.shape[0] * (1 if packed is None else per_page))
        entry_rows = load_rows(entries, scales, everything, DIM).double()
        for row, length in enumerate(lengths):
            at = table[requests[row]].repeat_interleave(per_page) * per_page
            at = at + torch.arange(len(at)) % per_page
            seen[row] = torch.cat((seen[row], entry_rows[at[:length].long()]))
    of_entries = (numbers if chosen else None, table, requests, visible, per_page)
    return SparseInputs(name, (*args, entries, scales, *of_entries), tuple(seen))


def store_rows(cache: torch.Tensor, scales: torch.Tensor | None, ids: torch.Tensor, generator: torch.Generator) -> None:
    """Fresh rows at ``ids``."""
    fresh = torch.randn(len(ids), DIM, generator=generator)
    store_rows_torch(fresh, ids, *((cache,) if scales is None else (cache, scales)))


def sparse_matrix(heads: tuple[int, ...], packed: torch.dtype) -> Iterator[SparseInputs]:
    """Every head count, page and kind of cache; sinks far up and down; a window alone."""
    for count in heads:
        for kind in (None, packed):
            yield sparse_inputs(count, 64, kind)
            yield sparse_inputs(count, 2, kind, chosen=False)
        yield sparse_inputs(count, 0, packed)
    for sink in (-60.0, 30.0):
        yield sparse_inputs(heads[0], 64, packed, sink)


def assert_near(found: torch.Tensor, truth: torch.Tensor) -> None:
    """Relative to the largest number of a row 2e-2, and a cosine of 0.9999; zero where the truth is."""
    found, truth = found.double().cpu().flatten(1), truth.flatten(1)
    top = truth.abs().amax(1, keepdim=True)
    assert bool(found.isfinite().all()), "not finite"
    worst = float(((found - truth).abs() - 2e-2 * top).max()) if len(truth) else 0.0
    assert worst <= 0, f"a number is off by {worst:.2g} more than 2e-2 of its row's largest"
    some = top.squeeze(1) > 0
    # A sink far above the logits leaves numbers whose squares are too small.
    found, truth = found[some] / top[some], truth[some] / top[some]
    cosine = torch.nn.functional.cosine_similarity(found, truth, dim=1)
    assert not len(cosine) or float(cosine.min()) > 0.9999, f"cosine {float(cosine.min())}"

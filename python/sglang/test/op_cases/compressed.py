"""Cases of the ops ``compressed.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.ops.attention.packed_rows import store_rows_torch
from sglang.test.cache_pools import make_pages
from sglang.test.op_cases import Case


def compress() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    # By name: tokens per entry, parts, rows of the step, and what each entry is made of.
    from_states = [-2 - j for j in range(5, 12)]
    plans = {
        "first-window": (4, 2, 5, [[-1, -1, -1, -1, 0, 1, 2, 3]]),
        "across": (4, 2, 9, [[*from_states, 0], [-9, -10, -11, -12, 1, 2, 3, 4], [1, 2, 3, 4, 5, 6, 7, 8]]),
        "none-closed": (4, 2, 1, [[-1] * 8]),
        "plain": (6, 1, 7, [[-5, -6, -7, 0, 1, 2], [-1] * 6]),
        "empty": (4, 2, 0, []),
    }
    for name, (ratio, parts, num_rows, made_of) in plans.items():
        dim, count = 10, len(made_of)
        sources = torch.tensor(made_of, dtype=torch.int64).view(count, parts * ratio)
        states = random(14, parts * dim), random(14, parts * dim)
        rows = torch.randperm(13, generator=generator)[:num_rows] + 1
        entry_rows = torch.tensor([i + 3 if entry[-1] >= 0 else 0 for i, entry in enumerate(made_of)]).long()
        first = torch.arange(count) * ratio
        table = torch.cat((random(16, 2).cos(), random(16, 2).sin()), dim=1)
        args = (
            random(num_rows, parts * dim), 3 * random(num_rows, parts * dim), *states, rows, sources,
            random(ratio, parts * dim), random(dim), 1e-6, table, first, entry_rows, random(8, dim),
        )  # fmt: skip
        yield Case(name, args)
        if name == "across":
            packed = make_pages(4, 2, dim, 4, torch.float8_e4m3fn)
            yield Case("across-packed-fp8", (*args[:-1], *packed))


def prepare() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    # By name: rows, heads, columns, columns that turn.
    for name, num_rows, heads, dim, rotary in (
        ("one", 1, 1, 16, 8), ("odd", 7, 5, 24, 8), ("wide", 3, 9, 512, 64), ("empty", 0, 2, 16, 8),
    ):  # fmt: skip
        both = torch.randn(num_rows, heads * dim + dim, generator=generator)
        angles = torch.rand(32, rotary // 2, generator=generator) * 6.3
        args = (
            both[:, : heads * dim].unflatten(1, (heads, dim)), both[:, heads * dim :],
            torch.randint(0, 32, (num_rows,), generator=generator), torch.cat((angles.cos(), angles.sin()), dim=1),
            torch.randn(dim, generator=generator), 1e-6, torch.randperm(12, generator=generator)[:num_rows],
        )  # fmt: skip
        yield Case(name, (*args, torch.zeros(12, dim)))
        for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
            yield Case(f"{name}-{str(dtype)[14:]}-fp8", (*args, *make_pages(6, 2, dim, rotary, dtype)))
            if name == "odd":
                # Zeros, what rounds to them from below, and a group of which one number is almost all.
                rows = torch.full((num_rows, dim), -0.0)
                rows[1:3], rows[1:3, ::5], rows[3, 3] = -1e-9, 448.0, -3e4
                pages = make_pages(6, 2, dim, rotary, dtype)
                yield Case(f"{name}-{str(dtype)[14:]}-small-fp8", (args[0], rows, *args[2:], *pages))


def select_entries() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    # By name: rows, entries per page, pages, top-k.
    shapes = {
        "scored": (7, 4, 5, 6), "one": (1, 1, 3, 1), "all-fit": (4, 4, 2, 8), "ties": (5, 2, 6, 5),
        "many-ties": (3, 64, 5, 100),
    }  # fmt: skip
    for name, (num_rows, per_page, pages, top_k) in (shapes | {"empty": (0, 4, 3, 2)}).items():
        table = (torch.randperm(3 * pages, generator=generator) + 1).view(3, pages).to(torch.int32)
        q = torch.randn(num_rows, 3, 8, generator=generator)
        keys = torch.randn((3 * pages + 1) * per_page, 8, generator=generator)
        if "ties" in name:
            # Integers, and heads that all see less than nothing: many scores are equal, or 0.
            q, keys = q.round(), keys.round()
            q[0] = 0
        keys[:per_page] = torch.nan
        requests = torch.randint(0, 3, (num_rows,), generator=generator)
        visible = torch.randint(0, pages * per_page + 1, (num_rows,), generator=generator).to(torch.int32)
        visible[:2] = torch.tensor([pages * per_page, 0])[: visible[:2].shape[0]]
        weights = torch.randn(num_rows, 3, generator=generator)
        weights = weights.round() if "ties" in name else weights
        args = (q, weights, keys, table, requests, visible, per_page, top_k)
        yield Case(name, args)
        if name == "scored":
            packed, scales = make_pages(len(keys) // per_page, per_page, 8, None, torch.float8_e4m3fn)
            store_rows_torch(keys, torch.arange(len(keys)), packed, scales)
            yield Case("scored-packed", (q, weights, packed, *args[3:], scales))


def _packed(rows: Tensor, per_page: int, tail: int) -> tuple[Tensor, Tensor]:
    """The rows [S, D] in pages of 8-bit rows, the last ``tail`` columns bfloat16."""
    pages = make_pages(rows.shape[0] // per_page, per_page, rows.shape[1], tail, torch.float8_e4m3fn)
    store_rows_torch(rows, torch.arange(rows.shape[0]), *pages)
    return pages


def sparse_attention() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def some(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    # By name: rows, heads, columns, rows of the window, chosen entries (None: all that are visible), sink.
    shapes = {
        "chosen": (6, 3, 12, 8, 5, 0.3), "all": (5, 2, 20, 7, None, -2.0), "wide": (3, 17, 96, 40, 70, 0.1),
        "one": (1, 1, 16, 1, 1, 0.0), "sink": (4, 2, 12, 8, 3, 60.0), "no-choice": (3, 2, 12, 4, 0, 0.0),
        "empty": (0, 2, 12, 4, 3, 0.0), "many-heads": (2, 70, 24, 18, 5, 0.2),
    }  # fmt: skip
    for name, (num_rows, heads, dim, num_window, num_chosen, sink) in shapes.items():
        q = torch.randn(num_rows, heads, dim, generator=generator)
        window, entries = (torch.randn(96, dim, generator=generator) for _ in range(2))
        # Two pages that no request has, and rows that none attends to, are full of NaN.
        window[0], entries[:4], entries[88:] = torch.nan, torch.nan, torch.nan
        rows = 1 + some(95, num_rows, num_window)
        rows[torch.rand(rows.shape, generator=generator) < 0.3] = -1
        rows[1:2] = -1
        table = (torch.randperm(21, generator=generator)[:20] + 1).view(2, 10).to(torch.int32)
        visible = some(41, num_rows)
        visible[1:2], visible[2:3] = 0, 40
        chosen = None
        if num_chosen is not None:
            chosen = some(40, num_rows, num_chosen)
            chosen[torch.rand(chosen.shape, generator=generator) < 0.2] = -1
        requests, sinks = some(2, num_rows).long(), sink + torch.randn(heads, generator=generator)
        of_entries = (chosen, table, requests, visible)
        yield Case(name, (q, window, rows, sinks, dim**-0.5, None, entries, None, *of_entries, 4))
        if name in ("chosen", "all", "wide"):
            (packed, scales), (few, few_scales) = _packed(window, 8, 4), _packed(entries, 4, 4)
            args = (q, packed, rows, sinks, dim**-0.5, scales, few, few_scales, *of_entries, 4)
            yield Case(f"{name}-packed", args)
        if name == "chosen":
            coarse = [cache.to(torch.float8_e4m3fn) for cache in (window, entries)]
            yield Case("8-bits", (q, coarse[0], rows, sinks, 0.3, None, coarse[1], None, *of_entries, 4))
            yield Case("window", (q, window, rows, sinks, dim**-0.5))

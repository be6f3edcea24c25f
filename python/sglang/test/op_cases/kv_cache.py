"""Cases of the ops ``kv_cache.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.test.op_cases import Case


def write_kv() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, heads, dim, value in ((1, 1, 8, 8), (5, 2, 12, 8), (0, 2, 8, 8), (9, 3, 20, 32)):
        both = torch.randn(rows, heads, dim + value, generator=generator)
        caches = torch.randn(12, heads, dim, generator=generator), torch.randn(12, heads, value, generator=generator)
        slots = torch.randperm(11, generator=generator)[:rows] + 1
        yield Case(f"{rows}x{heads}-strided", (both[..., :dim], both[..., dim:], *caches, slots))
        both[:1, :, ::3] *= 1e4
        coarse = [cache.to(torch.float8_e4m3fn) for cache in caches]
        yield Case(f"{rows}x{heads}-fp8", (both[..., :dim], both[..., dim:], *coarse, slots))


def gather_slots() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, 1 << 20, (9, 1500), generator=generator, dtype=torch.int32)
    spans = {"one": [(3, 0, 5)], "ragged": [(8, 2, 1), (0, 0, 1400), (4, 7, 0), (2, 1499, 1)], "empty": []}
    for name, entries in spans.items():
        rows, starts, lengths = (torch.tensor([entry[i] for entry in entries], dtype=torch.int64) for i in range(3))
        indptr = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        yield Case(name, (table, rows, starts, indptr, int(indptr[-1])))

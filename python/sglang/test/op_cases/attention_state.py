"""Cases of the ops ``attention_state.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sglang.test.op_cases import Case
from sglang.test.op_cases.attention import expanded_views, indptr, ragged_shapes


def extend() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*shape, True) for shape in ragged_shapes() if shape[0] != "many-blocks"]
    shapes.append(("prefix-part", [4, 1, 7], [30, 0, 5], False))
    for name, q_lens, kv_lens, causal in shapes:
        for heads, kv_heads, dim, v_dim in ((2, 2, 24, 16), (4, 2, 8, 8)):
            q = torch.randn(sum(q_lens), heads, dim, generator=generator)
            k = torch.randn(sum(kv_lens), kv_heads, dim, generator=generator)
            v = torch.randn(sum(kv_lens), kv_heads, v_dim, generator=generator)
            yield Case(f"{name}-{heads}x{kv_heads}", (q, k, v, indptr(q_lens), indptr(kv_lens), 0.3, causal))
        q = torch.randn(sum(q_lens), 4, 20, generator=generator)
        kv, rows = (torch.randn(sum(kv_lens), *shape, generator=generator) for shape in ((2, 24), (32,)))
        k, v, tail = expanded_views(kv, rows, 12, 8)
        yield Case(f"{name}-tail", (q, k, v, indptr(q_lens), indptr(kv_lens), 0.3, causal, tail))


def merge() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for rows, heads, dim in ((0, 2, 8), (1, 1, 16), (5, 3, 24)):
        outs = torch.randn(2, rows, heads, dim, generator=generator)
        lses = torch.randn(2, rows, heads, generator=generator) * 20
        if rows > 3:
            lses[0, 1] = lses[1, 2] = lses[:, 3] = float("-inf")
            outs[0, 1] = outs[1, 2] = outs[:, 3] = 0.0
        yield Case(f"{rows}x{heads}", (outs[0], lses[0], outs[1], lses[1]))

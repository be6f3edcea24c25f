"""Cases of the ops ``moe.*``: each function has the name of its op."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sglang.kernels.ops.moe.fused_experts_mxfp4 import random_experts
from sglang.kernels.ops.moe.topk import Routing, SharedSlots
from sglang.kernels.ops.quant.group_fp8 import quantize_groups_torch
from sglang.test.op_cases import Case
from sglang.test.op_cases.quant import random_blocks


def add_gated_shared() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    for tokens, hidden in ((1, 8), (7, 33), (0, 16), (5, 300)):
        routed, shared, x = torch.randn(3, tokens, 2 * hidden, generator=generator)[..., :hidden].unbind(0)
        yield Case(f"{tokens}x{hidden}", (routed, shared, x, torch.randn(1, hidden, generator=generator) / hidden**0.5))
    signs = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    yield Case("saturated", (signs, 3 * signs, 200 * signs, torch.ones(1, 2)))
    yield Case("nan-row", (signs, signs, torch.tensor([[float("nan"), 1.0], [1.0, 1.0]]), torch.ones(1, 2)))


def fused_experts() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = (
        ("one-row", 1, 8, 4, 4, 2),
        ("odd", 7, 12, 6, 5, 3),
        ("empty", 0, 8, 4, 4, 2),
        ("batch", 40, 32, 16, 8, 4),
    )
    for name, rows, hidden, intermediate, experts, top_k in shapes:
        x = torch.randn(rows, hidden, generator=generator)
        w13 = torch.randn(experts, 2 * intermediate, hidden, generator=generator) / hidden**0.5
        w2 = torch.randn(experts, hidden, intermediate, generator=generator) / intermediate**0.5
        weights = torch.rand(rows, top_k, generator=generator)
        ids = torch.randint(0, experts, (rows, top_k), generator=generator, dtype=torch.int32)
        yield Case(name, (x, w13, w2, weights, ids))
        yield Case(f"{name}-clamped", (x, w13, w2, weights, ids, 0.5))
        if rows > 1:
            yield Case(f"{name}-one-expert", (x, w13, w2, weights, torch.full_like(ids, experts - 1)))
            holes = ids.masked_fill(torch.rand(rows, top_k, generator=generator) < 0.4, -1)
            yield Case(f"{name}-holes", (x, w13, w2, weights, holes))
            yield Case(f"{name}-all-skipped", (x, w13, w2, weights, torch.full_like(ids, -1)))


def _blocks(count: int, rows: int, columns: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    data, scales = zip(*(random_blocks(rows, columns, generator) for _ in range(count)), strict=True)
    return torch.stack(data), torch.stack(scales)


def fused_experts_fp8() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 256, 128, 4, 2), (7, 128, 256, 5, 3), (0, 128, 128, 4, 2), (40, 256, 128, 8, 4))
    for rows, hidden, width, experts, top_k in shapes:
        x = torch.randn(rows, hidden, generator=generator)
        stacked = (*_blocks(experts, 2 * width, hidden, generator), *_blocks(experts, hidden, width, generator))
        weights = torch.rand(rows, top_k, generator=generator)
        ids = torch.randint(0, experts, (rows, top_k), generator=generator, dtype=torch.int32)
        yield Case(f"{rows}x{hidden}x{width}", (x, *stacked, weights, ids))
        yield Case(f"{rows}x{hidden}x{width}-clamped", (x, *stacked, weights, ids, None, None, 0.5))
        if rows > 1:
            holes = ids.masked_fill(torch.rand(rows, top_k, generator=generator) < 0.4, -1)
            yield Case(f"{rows}x{hidden}x{width}-holes", (x, *stacked, weights, holes))
            q, scale = quantize_groups_torch(x, stacked[0].dtype)
            yield Case(f"{rows}x{hidden}x{width}-quantised", (q, *stacked, weights, holes, scale, torch.float32))


def fused_experts_mxfp4() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 64, 32, 4, 2), (7, 96, 64, 5, 3), (0, 64, 32, 4, 2), (40, 64, 96, 8, 4))
    for rows, hidden, width, experts, top_k in shapes:
        x = torch.randn(rows, hidden, generator=generator)
        stacked = (*random_experts(experts, 2 * width, hidden, generator),
                   *random_experts(experts, hidden, width, generator))  # fmt: skip
        weights = torch.rand(rows, top_k, generator=generator)
        ids = torch.randint(0, experts, (rows, top_k), generator=generator, dtype=torch.int32)
        name = f"{rows}x{hidden}x{width}"
        yield Case(name, (x, *stacked, weights, ids))
        yield Case(f"{name}-clamped", (x, *stacked, weights, ids, 0.5))
        if rows > 1:
            holes = ids.masked_fill(torch.rand(rows, top_k, generator=generator) < 0.4, -1)
            yield Case(f"{name}-holes", (x, *stacked, weights, holes))
            yield Case(f"{name}-all-skipped", (x, *stacked, weights, torch.full_like(ids, -1)))
    x = torch.randn(3, 64, generator=generator) * 1e-3
    codes = [torch.randint(0, 256, shape, generator=generator).to(torch.uint8) for shape in ((2, 64, 32), (2, 64, 16))]
    # Groups of one row with scales far apart; the results are float32 all the same.
    scales = torch.tensor([100, 140], dtype=torch.uint8).expand(2, 64, 2).contiguous()
    ids = torch.tensor([[0, 1], [1, 1], [-1, 0]], dtype=torch.int32)
    yield Case("scales-apart", (x, codes[0], scales, codes[1], scales[..., :1].contiguous(), torch.ones(3, 2), ids))


def route_by_id() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(11, 16, generator=generator).argsort(-1)[:, :4].to(torch.int32)
    for rows in (1, 7, 0, 40):
        logits = torch.randn(rows, 16, generator=generator) * 3
        token_ids = torch.randint(0, 11, (rows,), generator=generator)
        for rule in (Routing(4, "sqrtsoftplus", True, scale=1.5), Routing(4, "sigmoid", False)):
            yield Case(f"{rows}-rows-{rule.scoring}", (logits, token_ids, table, rule))
    far = torch.tensor([[-60.0, 0.0, 80.0, -3.0]]).repeat(2, 4)
    yield Case("far", (far, torch.tensor([10, 0]), table, Routing(4, "sqrtsoftplus", True, scale=1.5)))


def router_logits() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)
    few, many = ((1, 5, 12), (1, 130, 40), (0, 4, 8), (7, 64, 33), (16, 70, 20)), ((17, 33, 70), (90, 8, 64))
    for tokens, experts, hidden in few + many:
        wide = torch.randn(tokens, hidden + 4, generator=generator)
        weight = torch.randn(experts, hidden, generator=generator) / hidden**0.5
        for dtype in (torch.float32, torch.float16):
            yield Case(f"{tokens}x{experts}x{hidden} {dtype}", (wide[:, :hidden].to(dtype), weight.to(dtype)))
    yield Case("nan-row", (torch.tensor([[float("nan"), 1.0], [1.0, 1.0]]), torch.ones(3, 2)))


def _logits() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 7, 0, 64):
        yield f"{rows}-rows", torch.randn(rows, 16, generator=generator) * 2
    yield "ties", torch.zeros(3, 16)
    ugly = torch.randn(4, 16, generator=generator)
    ugly[0, 3] = float("nan")
    ugly[1, :8] = float("-inf")
    ugly[2, 5] = 300.0
    ugly[3] = float("-inf")
    yield "nan-inf", ugly


def topk() -> Iterator[Case]:
    generator = torch.Generator().manual_seed(3)
    kinds = (("softmax", False, 1.0), ("softmax", True, 1.0), ("sigmoid", True, 2.5), ("sqrtsoftplus", True, 1.5))
    for name, logits in _logits():
        bias = torch.randn(16, generator=generator)
        for scoring, renormalize, scale in kinds:
            rule = Routing(4, scoring, renormalize, scale=scale)
            yield Case(f"{name}-{scoring}-{renormalize}", (logits, None, rule))
        for shared in (SharedSlots(1, gated=True), SharedSlots(2, 0.5), SharedSlots(3, 0.25, gated=True)):
            # A gate next to 16 experts, in rows that are longer than necessary.
            padded = torch.nn.functional.pad(logits, (0, 7), value=-0.5)[:, : 16 + shared.gated]
            yield Case(f"{name}-{shared}", (padded, None, Routing(4, "softmax", True, scale=2.5), shared))
        for n_group, topk_group in ((4, 2), (8, 3), (1, 1)):
            groups = f"{n_group}-{topk_group}"
            yield Case(f"{name}-{groups}", (logits, None, Routing(4, "softmax", False, n_group, topk_group, 16.0)))
            yield Case(f"{name}-biased-{groups}", (logits, bias, Routing(4, "sigmoid", True, n_group, topk_group, 2.5)))
        plain, biased = Routing(4, "softmax", False, 4, 2, 16.0), Routing(4, "sigmoid", True, 4, 2, 2.5)
        yield Case(f"{name}-shared", (logits, None, plain, SharedSlots(2)))
        yield Case(f"{name}-biased-shared", (logits, bias, biased, SharedSlots(1, 0.25)))
        yield Case(f"{name}-biased-sqrtsoftplus", (logits, bias, Routing(4, "sqrtsoftplus", True, scale=1.5)))

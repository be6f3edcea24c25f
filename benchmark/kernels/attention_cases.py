"""Attention shapes of served models for benches: inputs on the GPU, bytes they must move, products they need."""

from __future__ import annotations

from functools import partial

import torch
from timing import Timed

from sglang.kernels.launch import cdiv
from sglang.kernels.ops.attention.launchers import launch_decode, launch_extend
from sglang.kernels.ops.attention.tiles import RowShape, Tile

# Query heads, key heads, width of a key, width of a value; a latent row is its own value.
DECODE_LAYOUTS = {
    "mla_h16": (16, 1, 576, 512),
    "mla_h128": (128, 1, 576, 512),
    "gqa_16x2_d256": (16, 2, 256, 256),
    "gqa_32x8_d128": (32, 8, 128, 128),
}
EXTEND_LAYOUTS = {"mha_h16_192_128": (16, 16, 192, 128), "gqa_16x2_d256": (16, 2, 256, 256)}
DECODE_SHAPES = tuple((batch, tokens) for batch in (1, 8, 32, 128) for tokens in (1152, 8192))
EXTEND_SHAPES = ((1, 1024), (8, 1024), (1, 8192))
# Calls of a graph read sets of rows that together pass this, so that no call finds its rows in the cache.
COLD_BYTES = 150_000_000
MAX_SETS = 128
# Columns of the request table: what the number of splits is chosen from.
CONTEXT = 8192


def _slots(total: int, run: int, generator: torch.Generator) -> torch.Tensor:
    """0 .. total-1 in runs of ``run`` slots, the runs in a random order; int32 on the GPU."""
    starts = torch.randperm(cdiv(total, run), generator=generator).to("cuda", torch.int32) * run
    slots = (starts.unsqueeze(1) + torch.arange(run, device="cuda", dtype=torch.int32)).flatten()
    return slots[slots < total][:total]


def decode_case(
    layout: str, batch: int, tokens: int, run: int = 1, tile: Tile | None = None, splits: int | None = None
) -> Timed:
    """One decode step in bf16; slots are handed out in runs of ``run``."""
    heads, kv_heads, dim, value = DECODE_LAYOUTS[layout]
    latent = layout.startswith("mla")
    row_bytes = kv_heads * (dim if latent else dim + value) * 2
    num_bytes = batch * tokens * row_bytes + batch * heads * (dim + value) * 2
    flops = 2 * batch * heads * tokens * (dim + value)
    sets = max(1, min(MAX_SETS, cdiv(COLD_BYTES, num_bytes)))
    generator = torch.Generator().manual_seed(0)
    total = sets * batch * tokens
    keys = torch.randn(total, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    values = keys if latent else torch.randn(total, kv_heads, value, device="cuda", dtype=torch.bfloat16)
    tables = torch.zeros(sets, batch, max(tokens, CONTEXT), device="cuda", dtype=torch.int32)
    tables[..., :tokens] = _slots(total, run, generator).view(sets, batch, tokens)
    q = torch.randn(sets, batch, heads, dim, device="cuda", dtype=torch.bfloat16)
    rows = torch.arange(batch, device="cuda")
    lens = torch.full((batch,), tokens, device="cuda")
    shape = RowShape.of(dim, value, value_is_key=latent)
    scale = 192**-0.5 if latent else dim**-0.5
    calls = [
        partial(launch_decode, q[i], keys, values, tables[i], rows, lens, scale, shape, tile, splits)
        for i in range(sets)
    ]
    return Timed(f"{layout} bs{batch} ctx{tokens}", calls, num_bytes, flops)


def extend_case(layout: str, batch: int, tokens: int, tile: Tile | None = None) -> Timed:
    """Causal prefill without a prefix in bf16: expanded heads over packed rows, grouped heads over slots."""
    heads, kv_heads, dim, value = EXTEND_LAYOUTS[layout]
    total = batch * tokens
    q = torch.randn(total, heads, dim, device="cuda", dtype=torch.bfloat16)
    k = torch.randn(total, kv_heads, dim, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(total, kv_heads, value, device="cuda", dtype=torch.bfloat16)
    bounds = torch.arange(batch + 1, device="cuda") * tokens
    slots = _slots(total, 1, torch.Generator().manual_seed(0)).long() if heads != kv_heads else None
    shape = RowShape.of(dim, value)

    def call() -> torch.Tensor:
        return launch_extend(q, k, v, slots, bounds, bounds, dim**-0.5, shape, tile=tile)[0]

    flops = batch * heads * (dim + value) * tokens * (tokens + 1)
    num_bytes = 2 * (q.numel() + k.numel() + v.numel() + total * heads * value)
    return Timed(f"{layout} {batch}x{tokens}", [call], num_bytes, flops)

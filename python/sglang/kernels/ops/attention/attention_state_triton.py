"""Triton body of the merge of two attention states."""

import triton
import triton.language as tl


@triton.jit
def merge_states_kernel(
    out_a_ptr, lse_a_ptr, out_b_ptr, lse_b_ptr, out_ptr, lse_ptr,
    num_heads, BLOCK_H: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grid (rows, head blocks): out and lse [N, H] of the union; a part with lse -inf holds zeros and has no weight."""
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = heads < num_heads
    lse_a = tl.load(lse_a_ptr + row * num_heads + heads, mask=inside, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + row * num_heads + heads, mask=inside, other=float("-inf"))
    highest = tl.maximum(lse_a, lse_b)
    pivot = tl.where(highest == float("-inf"), 0.0, highest)
    weight_a = tl.exp(lse_a - pivot)
    weight_b = tl.exp(lse_b - pivot)
    total = weight_a + weight_b
    divisor = tl.where(total == 0.0, 1.0, total)
    columns = tl.arange(0, BLOCK_D)
    at = (row * num_heads + heads[:, None]) * DIM + columns[None, :]
    mask = inside[:, None] & (columns < DIM)[None, :]
    out_a = tl.load(out_a_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out_b = tl.load(out_b_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out = out_a * (weight_a / divisor)[:, None] + out_b * (weight_b / divisor)[:, None]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(total == 0.0, float("-inf"), pivot + tl.log(total))
    tl.store(lse_ptr + row * num_heads + heads, lse, mask=inside)

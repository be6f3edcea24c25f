"""Triton bodies of the router's product, with float32 sums in a fixed order: few tokens, and tiles of many."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead


@triton.jit(do_not_specialize=["tokens"])
def few_tokens_logits_kernel(
    x_ptr, w_ptr, out_ptr, tokens, experts, hidden, x_stride, w_stride,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grid (blocks of experts, blocks of tokens): memory alone counts, so no matrix unit."""
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    # Rows past the end read the last one: the store drops them.
    x_at = x_ptr + tl.minimum(token, tokens - 1) * x_stride
    w_at = w_ptr + tl.minimum(expert, experts - 1).to(tl.int64) * w_stride
    lane = tl.arange(0, BLOCK_K)[None, :]
    # Weights are asked for a step ahead, the first before the rows are there.
    w = tl.load(w_at[:, None] + lane, mask=lane < hidden, other=0.0)
    wait_for_kernel_ahead()
    acc = tl.zeros([BLOCK_T, BLOCK_E, BLOCK_K], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + lane
        x = tl.load(x_at[:, None] + k, mask=k < hidden, other=0.0).to(tl.float32)
        w_next = tl.load(w_at[:, None] + BLOCK_K + k, mask=BLOCK_K + k < hidden, other=0.0)
        acc += x[:, None, :] * w.to(tl.float32)[None, :, :]
        w = w_next
    mask = (token < tokens)[:, None] & (expert < experts)[None, :]
    tl.store(out_ptr + token[:, None] * experts + expert[None, :], tl.sum(acc, axis=2), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def many_tokens_logits_kernel(
    x_ptr, w_ptr, out_ptr, tokens, experts, hidden, x_stride, w_stride, tiles,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens times BLOCK_E experts a program, ``tiles`` blocks of experts."""
    expert = (tl.program_id(0) % tiles) * BLOCK_E + tl.arange(0, BLOCK_E)
    token = ((tl.program_id(0) // tiles) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + (tl.minimum(token, tokens - 1) * x_stride)[:, None] + k[None, :]
    w_at = w_ptr + (tl.minimum(expert, experts - 1).to(tl.int64) * w_stride)[None, :] + k[:, None]
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        inside = k < hidden - start
        x = tl.load(x_at, mask=inside[None, :], other=0.0)
        w = tl.load(w_at, mask=inside[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    mask = (token < tokens)[:, None] & (expert < experts)[None, :]
    tl.store(out_ptr + token[:, None] * experts + expert[None, :], acc, mask=mask)

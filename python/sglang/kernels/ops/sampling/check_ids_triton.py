"""Ids outside the vocabulary, marked and replaced in one launch."""

import triton
import triton.language as tl

from sglang.kernels.launch_triton import wait_for_kernel_ahead

TOKEN_ID_FAULT = tl.constexpr(3)  # what ``check_ids.py`` calls so


@triton.jit(do_not_specialize=["rows"])
def check_ids_kernel(chosen_ptr, faults_ptr, ids_ptr, checked_ptr, rows, vocab, BLOCK: tl.constexpr):
    wait_for_kernel_ahead()
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    chosen = tl.load(chosen_ptr + row, mask=inside, other=0)
    fault = tl.load(faults_ptr + row, mask=inside, other=0)
    outside = (chosen < 0) | (chosen >= vocab)
    last = tl.full([BLOCK], vocab - 1, chosen.dtype)
    tl.store(ids_ptr + row, tl.where(chosen < 0, 0, tl.where(outside, last, chosen)), mask=inside)
    tl.store(checked_ptr + row, tl.where((fault == 0) & outside, TOKEN_ID_FAULT, fault), mask=inside)

"""Runs the machine code of Triton's kernels for CDNA3 and CDNA4 on a CPU, through a checkout of tinygrad.

It shows what a compiler made of a kernel: wrong numbers, instructions, masks, addresses and barriers. It does not see
time, waits for memory (``s_waitcnt``), the order of waves between two barriers, caches, or other workgroups.
"""

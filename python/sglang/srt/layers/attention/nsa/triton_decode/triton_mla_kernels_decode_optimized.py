"""Which form of sparse attention a shape takes, under upstream's names; the kernel is ``compressed.sparse_attention``.

Both read window and entries in one pass, with one program per row and block of heads or with several. There is no third
form that gathers rows first: what neither predicate takes is served without a split.
"""

from __future__ import annotations

from sglang.kernels.ops.attention.sparse_splits import split_count, wants_no_split, wants_split
from sglang.srt.platforms import current_platform


def _should_use_fused_nosplitk(num_rows: int, local_heads: int, num_attended: int, arch: str | None = None) -> bool:
    """Whether one program per row and block of heads is best; local_heads: those of this rank, unpadded.

    num_attended: window and entries that a row may attend to. arch: None for that of the process; one without a table
    of its own splits where few programs would leave it idle.
    """
    arch = current_platform.arch if arch is None else arch
    found = wants_no_split(arch, num_rows, local_heads, num_attended)
    return split_count(num_rows, local_heads, num_attended, arch=arch) == 1 if found is None else found


def _should_use_fused_dual_scope(num_rows: int, local_heads: int, num_attended: int, arch: str | None = None) -> bool:
    """Whether rows are dealt to several programs, of a shape that ``_should_use_fused_nosplitk`` leaves."""
    arch = current_platform.arch if arch is None else arch
    found = wants_split(arch, num_rows, local_heads, num_attended)
    return split_count(num_rows, local_heads, num_attended, arch=arch) > 1 if found is None else found

"""DeepSeek V4: out of one sub-block and into the next by one op, up to so many rows on so many architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sglang.kernels.ops.mhc.hc_post_pre import PostPre, hc_post_pre
from sglang.kernels.ops.mhc.hc_post_pre_aiter import partial_sums as _get_fused_hc_post_pre_buffers
from sglang.kernels.registry import REGISTRY
from sglang.srt.environ import envs
from sglang.srt.platforms import current_platform

__all__ = ["_get_fused_hc_post_pre_buffers", "_get_triton_mhc_post_pre_ops", "max_fused_rows", "try_fused_hc_post_pre"]

# Rows of a step on gfx95x. sglang PR 26383, MI355X; not measured by this project.
_FUSED_HC_POST_PRE_M_THRESHOLD = 64
# The most rows that run fused, by the start of the architecture's name. Others have no entry, and run no step fused.
# sm_90: on an H200 1.4 to 1.7 times as fast as an op for each up to 256 rows, at 1024 below 1.2 (2026-11-30).
_FUSED_ROWS = {"gfx95": _FUSED_HC_POST_PRE_M_THRESHOLD, "sm_90": 256}


def max_fused_rows() -> int:
    """The most rows of a step that cross from sub-block to sub-block by one op; 0: none. A model asks as it is made."""
    if not envs.SGLANG_OPT_USE_TRITON_FUSED_MHC.get():
        return 0
    known = (rows for start, rows in _FUSED_ROWS.items() if current_platform.arch.startswith(start))
    return next(known, 0)


def try_fused_hc_post_pre(
    row: Tensor, streams: Tensor, post: Tensor, comb: Tensor, fn: Tensor, base: Tensor, scale: Tensor, rms_eps: float,
    hc_eps: float, iterations: int, norm_weight: Tensor, norm_eps: float, max_rows: int,
) -> PostPre | None:  # fmt: skip
    """``(residual, hidden_states, post, comb, norm_fused)`` of ``mhc.hc_post_pre``, or None where it does not run.

    Arguments as that op's. ``max_rows`` is the model's ``max_fused_rows``: with the shapes it decides alone, so capture
    and replay decide alike. What fails raises: the op table knows since start-up what can run.
    """
    if row.dim() != 2 or streams.dim() != 3 or not 0 < row.shape[0] <= max_rows:
        return None
    fused: PostPre = hc_post_pre(
        row, streams, post, comb, fn, base, scale, rms_eps, hc_eps, iterations, norm_weight, norm_eps
    )
    return fused


def _get_triton_mhc_post_pre_ops() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """AITER's ``mhc_post_pre`` and ``get_mhc_config``; None where they cannot run, which is found out once."""
    REGISTRY.chosen(hc_post_pre)
    if REGISTRY.records[hc_post_pre.name].verdicts["aiter_triton"] != "ok":
        return None
    from aiter.ops.triton.fusions.mhc import mhc_post_pre
    from aiter.ops.triton.utils.mhc_config_utils import get_mhc_config

    return mhc_post_pre, get_mhc_config

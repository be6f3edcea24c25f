"""What launchers of Triton kernels share on the host; importing it imports no Triton, and nothing reads device data."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sglang.kernels.registry import REGISTRY, probe_package
from sglang.kernels.spec import Impl
from sglang.srt.environ import envs
from sglang.srt.platforms import current_platform

logger = logging.getLogger(__name__)

# Dtypes that the Triton kernels load, compute in float32 and store.
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_EARLY = {"launch_pdl": True}


@cache
def imports_gluon(module: str) -> bool:
    """Whether a module of Gluon kernels imports: Triton's language for them is experimental. Where not, that is
    logged, and shown by ``/server_info``."""
    reason = probe_package(module)
    if reason is not None:
        REGISTRY.missing_modules[module] = reason
        logger.warning("%s does not import (%s): a slower kernel runs", module, reason)
    return reason is None


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (1 for 0)."""
    return 1 << max(n - 1, 0).bit_length()


class Rows(NamedTuple):
    """Row r of ``num_rows`` starts at ``(r // inner) * outer_stride + (r % inner) * inner_stride`` elements."""

    num_rows: int
    inner: int
    outer_stride: int
    inner_stride: int


def rows_of(x: Tensor) -> Rows | None:
    """Where the rows of ``x`` [..., D] are; None when a row is not dense or two strides do not reach all rows."""
    dim = x.shape[-1] if x.ndim else 0
    if x.ndim == 0 or (dim > 1 and x.stride(-1) != 1):
        return None
    if x.is_contiguous():
        return Rows(x.numel() // dim if dim else 0, 1, dim, 0)
    if x.ndim == 2:
        return Rows(x.shape[0], 1, x.stride(0), 0)
    if x.ndim == 3:
        return Rows(x.shape[0] * x.shape[1], x.shape[1], x.stride(0), x.stride(1))
    return None


def warps_for(elements: int) -> int:
    """Warps of a program that holds ``elements`` at once: 512 a warp, at most 8 warps."""
    return max(1, min(8, next_power_of_2(cdiv(elements, 512))))


def early_start() -> dict[str, bool]:
    """Options of a launch that may begin while the kernel ahead of it on its stream ends.

    For kernels that call ``wait_for_kernel_ahead`` first, after kernels of any kind; GPUs without such launches ignore
    it. CUDA programming guide, programmatic dependent launch.
    """
    return _EARLY if current_platform.kind == "cuda" and int(current_platform.arch[3:]) >= 90 else {}


def triton_dtype(dtype: torch.dtype) -> object:
    """Triton's name of a float ``dtype``, to be given to a kernel."""
    import triton.language as tl

    eight_bits = {torch.float8_e4m3fn: "float8e4nv", torch.float8_e4m3fnuz: "float8e4b8"}
    return getattr(tl, eight_bits.get(dtype, str(dtype).removeprefix("torch.")))


def triton_impl(fn: Callable[..., Any], accepts: Callable[..., bool], name: str = "triton", **limits: Any) -> Impl:
    """A Triton line of an op: runs on any GPU that Triton compiles for, or by ``limits``, where ``accepts`` says yes.

    Kernels step through a vector by its elements, so one whose elements are not side by side is never accepted: an
    expanded row of one element, read as if it were many, is memory of somebody else.
    """

    def accepts_dense(*args: Any, **kwargs: Any) -> bool:
        for arg in (*args, *kwargs.values()):
            if isinstance(arg, Tensor) and arg.ndim == 1 and not arg.is_contiguous():
                return False
        return accepts(*args, **kwargs)

    anywhere = {"kinds": {"hip", "cuda"}, "package": "triton", "needs_device": True}
    return Impl(name, fn, accepts=accepts_dense, **{**anywhere, **limits})


def aiter_impl(
    fn: Callable[..., Any], accepts: Callable[..., bool], name: str = "aiter", package: str = "aiter", **limits: Any
) -> Impl:
    """An AITER line of an op: on ROCm, where SGLANG_USE_AITER asks for it and ``accepts`` says yes; ``limits`` more."""
    switch = lambda: envs.SGLANG_USE_AITER.get()  # noqa: E731
    return Impl(name, fn, kinds={"hip"}, package=package, enabled=switch, accepts=accepts, **limits)

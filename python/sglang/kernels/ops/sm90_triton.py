"""What Gluon kernels for NVIDIA GPUs of sm_90 need of Triton: 3.6 or later, and copies by one name in all versions."""

import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

from sglang.kernels.registry import is_older

# Before it warp_specialize() took other arguments.
if is_older(triton.__version__, (3, 6)):
    raise ImportError(f"Triton is {triton.__version__}, this needs 3.6")

# Triton 3.9 renamed all of them.
copy_rows = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
join_warps = getattr(gl, "thread_barrier", None) or gl.barrier

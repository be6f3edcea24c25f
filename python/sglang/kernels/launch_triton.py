"""What Triton bodies of all groups share: a kernel that may begin early waits for the one ahead of it."""

import triton
import triton.language as tl
from triton.language.target_info import cuda_capability_geq
from triton.runtime.jit import constexpr_function


@constexpr_function
def _may_begin_early():
    """Whether the target has such launches; the interpreter has none, whatever GPU it runs next to."""
    return not triton.knobs.runtime.interpret and cuda_capability_geq(9, 0)


@triton.jit
def wait_for_kernel_ahead():
    """In every kernel that is launched with ``early_start()``, before it reads or writes anything but weights.

    No step writes weights, and between a kernel that does and a step others come that start when all before them has
    ended. After the wait all kernels launched earlier on the stream have ended, as each of them waited too, and what
    they wrote is seen; the next one may begin. PTX ISA, griddepcontrol.
    """
    if _may_begin_early():
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

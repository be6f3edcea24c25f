"""Variables of other software that change how this engine runs on a machine; they are documented, never refused.

Sources: MORI 1.2 and AITER 0.1 (read in source), the HIP runtime's and Hugging Face's documentation.
"""

from __future__ import annotations

from typing import NamedTuple


class EnvForeign(NamedTuple):
    """One variable of someone else: `default` is the owner's, empty if there is none; `owner` reads it."""

    name: str
    owner: str
    default: str
    doc: str


FOREIGN = (
    EnvForeign(
        "GPU_MAX_HW_QUEUES",
        "HIP runtime",
        "4",
        "Hardware queues that HIP creates for a process. Two streams overlap only if each gets a queue: dual-stream "
        "MoE needs at least 5. Read once, before the first HIP call; the launcher sets it for its processes when a "
        "second stream is used and it is not set.",
    ),
    EnvForeign("HIP_VISIBLE_DEVICES", "HIP runtime", "", "Indices of the AMD GPUs that a process sees."),
    EnvForeign("ROCR_VISIBLE_DEVICES", "ROCm runtime", "", "As `HIP_VISIBLE_DEVICES`, one layer below."),
    EnvForeign("CUDA_VISIBLE_DEVICES", "CUDA", "", "Indices of the GPUs that a process sees; HIP honours it too."),
    EnvForeign(
        "HIP_FORCE_DEV_KERNARG", "HIP runtime", "", "1 places kernel arguments in device memory. AMD's images set it."
    ),
    EnvForeign(
        "HSA_NO_SCRATCH_RECLAIM", "ROCm runtime", "", "1 keeps scratch memory between kernels. AMD's images set it."
    ),
    EnvForeign(
        "ROCM_QUICK_REDUCE_QUANTIZATION",
        "upstream sglang",
        "",
        "Quantises upstream's all-reduce (`INT8` in some AMD images). Not read here: collectives are never quantised.",
    ),
    EnvForeign("NCCL_MIN_NCHANNELS", "RCCL", "", "Least number of channels of a collective. AMD's images set 112."),
    EnvForeign("NCCL_SOCKET_IFNAME", "NCCL, RCCL", "", "Network interface for the start of collectives between nodes."),
    EnvForeign("GLOO_SOCKET_IFNAME", "gloo", "", "Network interface of CPU collectives between nodes."),
    EnvForeign("OMP_NUM_THREADS", "OpenMP, torch", "", "CPU threads of one torch operation."),
    EnvForeign(
        "HF_HUB_OFFLINE", "Hugging Face", "", "1 forbids the hub. It makes no difference here: no hub is contacted."
    ),
    EnvForeign("TRITON_CACHE_DIR", "Triton", "~/.triton/cache", "Folder of compiled Triton kernels."),
    EnvForeign("AITER_LOG_LEVEL", "AITER", "INFO", "What AITER logs."),
    EnvForeign(
        "AITER_BF16_FP8_MOE_BOUND",
        "AITER",
        "256",
        "Rows below which an fp4 MoE computes activations in bf16 and above which in fp8.",
    ),
    EnvForeign("AITER_FLYDSL_FORCE", "AITER", "0", "1 forces AITER's FlyDSL kernels, which compile at first use."),
    EnvForeign(
        "AITER_TRITON_ONLY", "AITER", "0", "1 leaves AITER without its compiled ops; they then count as absent."
    ),
    EnvForeign(
        "MORI_ENABLE_SDMA",
        "MORI",
        "0",
        "1 copies by SDMA engines, without which AsyncLL is slow. Read once, when MORI starts.",
    ),
    EnvForeign(
        "MORI_SHMEM_HEAP_SIZE",
        "MORI",
        "4G",
        "Symmetric heap of a rank. The launcher sets it for its processes to what the exchange needs when it is not "
        "set, and refuses less; `python -m sglang.plan` shows the sum.",
    ),
    EnvForeign(
        "MORI_SHMEM_MODE",
        "MORI",
        "static_heap",
        "`static_heap`, `vmm_heap` or `isolation`. Other values mean the first.",
    ),
    EnvForeign("MORI_NUM_QP_PER_PE", "MORI", "4", "Most RDMA queue pairs to a peer."),
    EnvForeign("MORI_RDMA_DEVICES", "MORI", "", "RDMA devices to use, or with a leading `^` not to use."),
    EnvForeign("MORI_RDMA_SL", "MORI", "", "RDMA service level."),
    EnvForeign("MORI_RDMA_TC", "MORI", "", "RDMA traffic class."),
    EnvForeign("MORI_IB_GID_INDEX", "MORI", "", "RDMA GID index."),
    EnvForeign("MORI_SOCKET_IFNAME", "MORI", "", "Network interface for the start of MORI."),
    EnvForeign("MORI_BOOTSTRAP_TIMEOUT", "MORI", "300", "Seconds that the start of MORI waits for all ranks."),
    EnvForeign("MORI_DISABLE_P2P", "MORI", "0", "1 forces RDMA within a node."),
    EnvForeign("MORI_EP_LAUNCH_CONFIG_MODE", "MORI", "MANUAL", "`AUTO` takes launch geometry from MORI's tuning file."),
    EnvForeign(
        "MORI_FP8_COMBINE_SCALE_DIM",
        "MORI",
        "56",
        "Scales a token of the fp8 combine: hidden size over 128; 56 is for 7168.",
    ),
    EnvForeign("MORI_JIT_CACHE_DIR", "MORI", "~/.mori/jit", "Folder of MORI's compiled kernels."),
    EnvForeign("MORI_APP_LOG_LEVEL", "MORI", "INFO", "What MORI logs."),
)

"""The settings of kernels, recurrent states and captured graphs."""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.arg_groups.fields import flag
from sglang.srt.arg_groups.upstream import UPSTREAM_ONLY
from sglang.srt.configs.attention_backends import attention_backend_names

KERNELS = "Kernel backend"
LINEAR = "Mamba and linear attention"
GRAPHS = "Graphs and overlap"


@dataclass(frozen=True)
class KernelArgs:
    """The part of ``ServerArgs`` that chooses what computes a step."""

    attention_backend: str | None = flag(
        None,
        "Implementation that attention prefers; triton and aiter need a GPU. In this build aiter becomes triton.",
        KERNELS,
        choices=attention_backend_names,
        upstream_only=UPSTREAM_ONLY["attention_backend"],
        auto="torch_native on CPU, else triton",
    )
    sampling_backend: str | None = flag(
        None, "Sampler.", KERNELS, choices=("pytorch",), upstream_only=("flashinfer", "ascend"), auto="pytorch"
    )
    mamba_ssm_dtype: str | None = flag(
        None,
        "Type of the recurrent state of linear-attention layers.",
        LINEAR,
        choices=("float32", "bfloat16", "float16"),
        auto="`SGLANG_MAMBA_SSM_DTYPE`, else the checkpoint's",
    )
    max_mamba_cache_size: int | None = flag(
        None, "Slots for recurrent states, of running requests and of cached prefixes.", LINEAR, minimum=1
    )
    disable_cuda_graph: bool = flag(False, "Capture no CUDA or HIP graphs.", GRAPHS)
    cuda_graph_bs: list[int] | None = flag(None, "Batch sizes to capture.", GRAPHS, minimum=1)
    cuda_graph_max_bs: int | None = flag(None, "Largest batch size to capture.", GRAPHS, minimum=1)
    disable_piecewise_cuda_graph: bool = flag(False, "Capture no graphs of prompt steps.", GRAPHS)
    piecewise_cuda_graph_tokens: list[int] | None = flag(
        None, "Numbers of tokens of a prompt step to capture.", GRAPHS, minimum=1
    )
    piecewise_cuda_graph_max_tokens: int | None = flag(
        None,
        "Largest number of tokens of a prompt step to capture, within --chunked-prefill-size.",
        GRAPHS,
        minimum=1,
        auto="2048",
    )
    disable_overlap_schedule: bool = flag(
        False, "Prepare a step only after the previous one has ended; always the case on CPU.", GRAPHS
    )
    enable_mixed_chunk: bool = flag(False, "Let decoding requests join a step of prompt chunks.", GRAPHS)

"""The settings of kernels, recurrent states and captured graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from sglang.srt.arg_groups.fields import Arg
from sglang.srt.arg_groups.upstream import UPSTREAM_ONLY
from sglang.srt.configs.attention_backends import attention_backend_names

KERNELS = "Kernel backend"
LINEAR = "Mamba and linear attention"
GRAPHS = "Graphs and overlap"


@dataclass(frozen=True)
class KernelArgs:
    """The part of ``ServerArgs`` that chooses what computes a step."""

    attention_backend: Annotated[
        str | None,
        Arg(
            "Implementation that attention prefers; triton and aiter need a GPU. In this build aiter becomes triton.",
            KERNELS,
            choices=attention_backend_names,
            upstream_only=UPSTREAM_ONLY["attention_backend"],
            auto="torch_native on CPU, else triton",
        ),
    ] = None
    sampling_backend: Annotated[
        str | None,
        Arg("Sampler.", KERNELS, choices=("pytorch",), upstream_only=("flashinfer", "ascend"), auto="pytorch"),
    ] = None
    mamba_ssm_dtype: Annotated[
        str | None,
        Arg(
            "Type of the recurrent state of linear-attention layers.",
            LINEAR,
            choices=("float32", "bfloat16", "float16"),
            auto="`SGLANG_MAMBA_SSM_DTYPE`, else the checkpoint's",
        ),
    ] = None
    max_mamba_cache_size: Annotated[
        int | None, Arg("Slots for recurrent states, of running requests and of cached prefixes.", LINEAR, minimum=1)
    ] = None
    disable_cuda_graph: Annotated[bool, Arg("Capture no CUDA or HIP graphs.", GRAPHS)] = False
    cuda_graph_bs: Annotated[list[int] | None, Arg("Batch sizes to capture.", GRAPHS, minimum=1)] = None
    cuda_graph_max_bs: Annotated[int | None, Arg("Largest batch size to capture.", GRAPHS, minimum=1)] = None
    disable_piecewise_cuda_graph: Annotated[bool, Arg("Capture no graphs of prompt steps.", GRAPHS)] = False
    piecewise_cuda_graph_tokens: Annotated[
        list[int] | None, Arg("Numbers of tokens of a prompt step to capture.", GRAPHS, minimum=1)
    ] = None
    piecewise_cuda_graph_max_tokens: Annotated[
        int | None,
        Arg(
            "Largest number of tokens of a prompt step to capture, within --chunked-prefill-size.",
            GRAPHS,
            minimum=1,
            auto="2048; none for DeepSeek V4, whose prompt steps are captured on request",
        ),
    ] = None
    disable_overlap_schedule: Annotated[
        bool, Arg("Prepare a step only after the previous one has ended; always the case on CPU.", GRAPHS)
    ] = False
    enable_mixed_chunk: Annotated[bool, Arg("Let decoding requests join a step of prompt chunks.", GRAPHS)] = False

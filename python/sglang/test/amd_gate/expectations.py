"""Instructions that a well compiled kernel contains, by kernel: data of the AMD gate."""

from __future__ import annotations

MFMA_BF16 = r"v_mfma_f32_\d+x\d+x\d+_bf16"
MFMA_FP8 = r"v_mfma_(scale_)?f32_\d+x\d+x\d+_(fp8_fp8|f8f6f4)"
# Past 2 GiB Triton addresses a tensor with 64 bits, not through a buffer descriptor: both kinds of load are wide.
WIDE_LOAD = r"(buffer|global)_load_(lds_)?dwordx4"
WIDE_BUFFER_LOAD = r"buffer_load_dwordx4"

# kernel -> regular expressions over its assembly
EXPECTED: dict[str, tuple[str, ...]] = {
    "rms_norm_kernel": (WIDE_BUFFER_LOAD,),
    "greedy_kernel": (WIDE_BUFFER_LOAD,),
    "scan_kernel": (WIDE_LOAD,),
    "one_token_kernel": (WIDE_LOAD,),
    "one_token_down_kernel": (WIDE_LOAD,),
    "few_tokens_kernel": (WIDE_LOAD, MFMA_BF16),
    "many_tokens_kernel": (WIDE_LOAD, MFMA_BF16),
    "few_tokens_mxfp4_kernel": (WIDE_LOAD, MFMA_BF16),
    "many_tokens_mxfp4_kernel": (WIDE_LOAD, MFMA_BF16),
    "few_tokens_logits_kernel": (WIDE_LOAD,),
    "many_tokens_logits_kernel": (WIDE_LOAD, MFMA_BF16),
    "block_fp8_linear_kernel": (WIDE_LOAD, MFMA_FP8),
    "one_row_fp8_linear_kernel": (WIDE_LOAD,),
    "decode_step_kernel": (WIDE_LOAD,),
    "solve_chunks_kernel": (WIDE_LOAD, MFMA_BF16),
    "scan_chunks_kernel": (WIDE_LOAD, MFMA_BF16),
}


def expected_instructions(kernel: str, shape: str) -> tuple[str, ...]:
    """What the kernel's code must contain at ``shape``; nothing is expected of float32, which only proofs use."""
    expected = () if shape.endswith(" fp32") else EXPECTED.get(kernel, ())
    return tuple(MFMA_FP8 if want == MFMA_BF16 and shape.endswith(" fp8") else want for want in expected)

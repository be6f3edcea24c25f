"""What a checkpoint holds of a quantised matrix, and the numbers that it stands for."""

from __future__ import annotations

import torch

from sglang.kernels.ops.quant.group_fp8 import dequantize_blocks
from sglang.kernels.ops.quant.mxfp4 import LARGEST_FLOAT32, NAN_BYTE, PACKED, dequantize_mxfp4
from sglang.srt.configs.quantization import FP8_BLOCKS, BlockShape, WeightFormat
from sglang.srt.layers.weights import FLOATS, PLAIN, Leaf, WeightFormatError

# What checkpoints hold of 8-bit matrices, on every machine.
FP8 = torch.float8_e4m3fn
# A scale that is a power of two, as its exponent + 127; 255 is NaN. OCP Microscaling Formats 1.0, section 5.4.1.
E8M0 = torch.float8_e8m0fnu
# Two four-bit floats to a byte, by whatever name the checkpoint has for bytes.
CODES = tuple(
    getattr(torch, name) for name in ("uint8", "int8", "float4_e2m1fn_x2") if hasattr(torch, name)
)  # fmt: skip
PAIRS = BlockShape(1, PACKED)


def leaves_of(known: WeightFormat) -> tuple[Leaf, ...]:
    """The tensors of a matrix in format ``known``."""
    suffix = known.scale_suffix
    if known.name == FP8_BLOCKS.name:
        return Leaf("", (FP8,), partner=suffix), Leaf(suffix, (*FLOATS, E8M0), known.block, partner="")
    return Leaf("", CODES, PAIRS, partner=suffix), Leaf(suffix, (torch.uint8, E8M0), known.block, partner="")


# Matrices of another format than their module's, which are refused with a better reason than their dtype.
OTHER_THAN_FP8 = (PLAIN, Leaf("", CODES, PAIRS))
OTHER_THAN_MXFP4 = (Leaf("", (*FLOATS, FP8)),)


def check_format(loaded: torch.Tensor, wanted: tuple[torch.dtype, ...], name: str) -> None:
    """Raise WeightFormatError unless ``loaded`` is of a dtype that format ``name`` has."""
    if loaded.dtype not in wanted:
        found, *known = (str(dtype).removeprefix("torch.") for dtype in (loaded.dtype, *wanted))
        raise WeightFormatError(
            f"dtype {found}, but config.json says that it is quantised ({name}): it needs {' or '.join(known)} with "
            "scales, or a place under modules_to_not_convert (exclude, for Quark); a module's matrices have one format"
        )


def block_scales(scale: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A checkpoint's scales as float32 on ``device``; raises WeightFormatError for one that is infinite or NaN."""
    scale = scale.float()
    # Tensors without contents stand for weights where a model's shapes alone are walked.
    if not scale.is_meta and not bool(scale.isfinite().all()):
        raise WeightFormatError("its scales contain infinite numbers or NaN (byte 255 in float8_e8m0fnu)")
    return scale.to(device)


def mxfp4_parts(loaded: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as uint8; raises WeightFormatError for a scale that is NaN."""
    scale = scale.view(torch.uint8)
    if not scale.is_meta and bool((scale == NAN_BYTE).any()):
        raise WeightFormatError(
            "its scales contain byte 255, which is NaN: the checkpoint is damaged, download it again"
        )
    return loaded.view(torch.uint8), scale


def scaled_back(known: WeightFormat, loaded: torch.Tensor, scale: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The matrix in float32 on ``device``; raises WeightFormatError for scales that are no numbers."""
    if known.name != FP8_BLOCKS.name:
        codes, exponents = mxfp4_parts(loaded, scale)
        if not exponents.is_meta and bool((exponents > LARGEST_FLOAT32).any()):
            raise WeightFormatError(f"its scales contain bytes above {LARGEST_FLOAT32}, too large for plain weights")
        return dequantize_mxfp4(codes.to(device), exponents.to(device))
    return dequantize_blocks(loaded.to(device), block_scales(scale, device))

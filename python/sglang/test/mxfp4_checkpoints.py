"""Tiny checkpoints whose routed experts are MXFP4, in the layouts of Quark and DeepSeek V4, and dequantized."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_EXPERT = re.compile(r"\.experts\.\d+\.\w+\.weight$")
# Of DeepSeek V4: what official checkpoints hold in fp8 blocks next to the experts.
_V4_DENSE = re.compile(r"\.attn\.((wq_a|wq_b|wkv|wo_a|wo_b)|indexer\.wq_b)\.weight$|\.shared_experts\.w\d\.weight$")
_SPEC = {
    "dtype": "fp4", "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0", "ch_axis": -1,
    "observer_cls": "PerBlockMXObserver", "round_method": "half_even", "scale_calculation_mode": "even",
}  # fmt: skip


def quark_config(exclude: list[str], **changes: Any) -> dict[str, Any]:
    """A quantization_config as Quark writes it for MXFP4 weights and rows, all modules but ``exclude``."""
    layers = {
        "weight": {**_SPEC, "is_dynamic": False},
        "input_tensors": {**_SPEC, "is_dynamic": True},
        "output_tensors": None,
        "bias": None,
        "target_device": None,
    }
    settings: dict[str, Any] = {
        "quant_method": "quark", "quant_mode": "eager_mode", "version": "0.10", "algo_config": None,
        "global_quant_config": layers, "layer_quant_config": {}, "layer_type_quant_config": {}, "exclude": exclude,
        "kv_cache_quant_config": {}, "softmax_quant_spec": None,
        "export": {"kv_cache_group": [], "min_kv_scale": 0.0, "pack_method": "reorder", "weight_merge_groups": None,
                   "weight_format": "real_quantized"},
    }  # fmt: skip
    return {**settings, **changes}


def true_weights(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """codes [..., C / 2], scale bytes [..., C / 32] -> [..., C] float64, a column at a time."""
    values = torch.cat((VALUES, -VALUES)).double()
    out = torch.zeros(*codes.shape[:-1], 2 * codes.shape[-1], dtype=torch.float64)
    for column in range(out.shape[-1]):
        code = (codes[..., column // 2].int() >> 4 * (column % 2)) % 16
        out[..., column] = values[code] * 2.0 ** (scale[..., column // 32].double() - 127)
    return out


def pack(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """w [R, C] -> codes [R, C / 2], scale bytes [R, C / 32], and the numbers that these stand for."""
    groups = w.float().view(w.shape[0], -1, 32)
    exponent = groups.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor() - 2
    scaled = groups / exponent.exp2()
    nearest = (scaled.abs().unsqueeze(-1) - VALUES).abs().argmin(-1)
    numbers = (VALUES[nearest].copysign(scaled) * exponent.exp2()).view(w.shape)
    codes = (nearest + 8 * (scaled < 0)).view(w.shape).to(torch.uint8)
    return codes[:, ::2] + 16 * codes[:, 1::2], (exponent.squeeze(-1) + 127).to(torch.uint8), numbers


def save_four_bit(source: str | Path, folder: str | Path, style: str) -> dict[str, torch.Tensor]:
    """Write ``source`` with experts in MXFP4 to ``folder``/mxfp4, and the same numbers in float32 to ``folder``/plain.

    style: "quark", or "v4", which has dense matrices in fp8 blocks with scales that are powers of two besides, and a
    third twin ``folder``/fp8 whose experts are in fp8 too, with numbers of its own. Returns the tensors of mxfp4.
    """
    source, folder = Path(source), Path(folder)
    config = json.loads((source / "config.json").read_text())
    packed: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    eight: dict[str, torch.Tensor] = {}
    exclude = []
    for name, tensor in load_file(source / "model.safetensors").items():
        if _EXPERT.search(name):
            codes, scale, plain[name] = pack(tensor)
            if style == "quark":
                packed |= {name: codes, name.replace(".weight", ".weight_scale"): scale}
            else:
                exponents = scale.view(torch.float8_e8m0fnu)
                packed |= {name: codes.view(torch.int8), name.replace(".weight", ".scale"): exponents}
                eight |= _blocks(name, tensor)[0]
        elif style == "v4" and _V4_DENSE.search(name):
            tensors, plain[name] = _blocks(name, tensor)
            packed |= tensors
            eight |= tensors
        else:
            packed[name] = plain[name] = eight[name] = tensor
            exclude += [name.removesuffix(".weight")] if name.endswith(".weight") and tensor.dim() == 2 else []
    settings = quark_config(exclude) if style == "quark" else {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "scale_fmt": "ue8m0",
    }  # fmt: skip
    beside = {} if style == "quark" else {"expert_dtype": "fp4"}
    for twin, tensors, changes in (
        ("plain", plain, {}), ("mxfp4", packed, {"quantization_config": settings, **beside}),
        *([("fp8", eight, {"quantization_config": settings, **beside})] if style == "v4" else []),
    ):  # fmt: skip
        (folder / twin).mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / twin / "model.safetensors")
        (folder / twin / "config.json").write_text(json.dumps({**config, **changes}))
    return packed


def _blocks(name: str, tensor: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A matrix in fp8 blocks under DeepSeek V4's names, one power of two per block, and its numbers."""
    w = tensor.float()
    rows, columns = w.shape
    scales = torch.ones(-(-rows // 128), -(-columns // 128))
    q, numbers = torch.zeros(w.shape).to(torch.float8_e4m3fn), torch.zeros(w.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            scales[i, j] = (w[block].abs().max() / 448).log2().ceil().exp2()
            q[block] = (w[block] / scales[i, j]).to(q.dtype)
            numbers[block] = q[block].float() * scales[i, j]
    return {name: q, name.replace(".weight", ".scale"): scales.to(torch.float8_e8m0fnu)}, numbers

#!/usr/bin/env python3
"""Write a copy of a checkpoint whose routed experts are MXFP4, laid out as AMD Quark does.

    python scripts/quantize_mxfp4.py python/sglang/embedded_models/deepseek-v3-tiny /tmp/deepseek-v3-mxfp4-tiny

Each group of 32 weights of a row gets the power of two under which its largest fits, and each weight the nearest of
the sixteen numbers, ties to the even code. All other tensors stay as they are, drafting layers too. Experts must stand
in the files one by one, in 16 or 32 bits.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sglang.kernels.ops.quant.mxfp4 import quantize_mxfp4
from sglang.srt.configs.model_config import text_part

_EXPERT = re.compile(r"layers\.(?P<layer>\d+)\..*\.experts\.\d+\.(gate|up|down)_proj\.weight$")
_SPEC = {
    "dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_format": "e8m0",
    "scale_calculation_mode": "even", "round_method": "half_even", "observer_cls": "PerBlockMXObserver",
}  # fmt: skip


def quark_settings(plain: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of weights in MXFP4 in all modules but ``plain``; rows of activations as they are."""
    layers = {"weight": {**_SPEC, "is_dynamic": False}, "input_tensors": None, "output_tensors": None, "bias": None}
    return {
        "quant_method": "quark",
        "quant_mode": "eager_mode",
        "global_quant_config": layers,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "exclude": plain,
        "export": {"pack_method": "reorder", "weight_format": "real_quantized", "kv_cache_group": []},
    }


def quantize(source: Path, folder: Path) -> int:
    """Write the copy of ``source`` to ``folder``; returns how many matrices became MXFP4."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config"):
        raise SystemExit(f"{source} is quantised already ({config['quantization_config'].get('quant_method')})")
    num_layers = text_part(config)["num_hidden_layers"]
    folder.mkdir(parents=True, exist_ok=True)
    plain, count = set(), 0
    places: dict[str, str] = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(path).items():
            match = _EXPERT.search(name)
            if match is not None and int(match["layer"]) < num_layers:
                tensors[name], tensors[name.replace(".weight", ".weight_scale")] = quantize_mxfp4(tensor)
                count += 1
                continue
            tensors[name] = tensor
            if name.endswith(".weight") and tensor.dim() == 2:
                plain.add(re.sub(r"\.experts\.\d+\..*", ".experts", name.removesuffix(".weight")))
        save_file(tensors, folder / path.name, metadata={"format": "pt"})
        (folder / path.name).chmod(0o644)
        places |= dict.fromkeys(tensors, path.name)
    if not count:
        raise SystemExit(f"{source} holds no expert as *.experts.N.gate_proj.weight, which are the ones to quantise")
    if len(set(places.values())) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    for path in source.glob("*.json"):
        if path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(path, folder / path.name)
    config["quantization_config"] = quark_settings(sorted(plain))
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the checkpoint")
    parser.add_argument("folder", type=Path, help="where the copy goes")
    args = parser.parse_args()
    count = quantize(args.source, args.folder)
    size = sum(path.stat().st_size for path in args.folder.glob("*.safetensors"))
    print(f"{count} matrices in MXFP4, {size / 1e6:.2f} MB in {args.folder}")


if __name__ == "__main__":
    main()

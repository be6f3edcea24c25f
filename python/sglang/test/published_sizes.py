"""The published sizes of models that are tuned for and checked, as the content of their config.json.

The Qwen3.5 sizes are put together from public material: call what is measured with them "Qwen3.5-35B-like".
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SIZES: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
DEEPSEEK_V2_LITE, DEEPSEEK_V3 = _SIZES["deepseek-v2-lite"], _SIZES["deepseek-v3"]
# Eight of V4-Flash's 43 layers, of every kind.
DEEPSEEK_V4_FLASH_8L = _SIZES["deepseek-v4-flash"]
BLOCK_FP8: dict[str, Any] = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip


def qwen35_like(num_layers: int) -> dict[str, Any]:
    """Three linear-attention layers to one of full attention, the text model inside a conditional-generation config."""
    config = _SIZES["qwen3.5-35b-like"]
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(num_layers)]
    return {**config, "text_config": {**config["text_config"], "num_hidden_layers": num_layers, "layer_types": kinds}}

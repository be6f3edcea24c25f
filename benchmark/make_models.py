"""Write model folders without weights (config.json and a small tokenizer), to be served with --load-format dummy.

    python benchmark/make_models.py OUT_DIR [NAME ...]

    deepseek-v2-lite       27 layers, bf16, 15.7 B parameters        31.4 GB
    deepseek-v3-4l-fp8     V3's sizes, 1 dense + 3 MoE layers, fp8   39 GB (needs block-scaled fp8); MTP layer: 12 GB
    deepseek-v3-4l-mxfp4   the same with routed experts in MXFP4     21 GB
    deepseek-v3-3l-bf16    V3's sizes, 1 dense + 2 MoE layers, bf16  51 GB
    deepseek-v4-flash-8l   8 of V4-Flash's 43 layers, fp8            54 GB; MTP layer: 7 GB
    qwen3.5-35b-a3b-20l    20 of 40 layers (15 GDN, 5 full), bf16    36 GB; MTP layer: 2 GB
    qwen3.5-35b-a3b-8l     8 of 40 layers (6 GDN, 2 full), bf16      15 GB
    deepseek-v2-tiny, qwen3.5-tiny: few layers at the same sizes, for smoke tests

The Qwen3.5 sizes are put together from public material: call what is measured with them "Qwen3.5-35B-like".
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sglang.test.bench_checkpoint import write_tokenizer
from sglang.test.published_sizes import (
    BLOCK_FP8,
    DEEPSEEK_V2_LITE,
    DEEPSEEK_V3,
    DEEPSEEK_V4_FLASH_8L,
    qwen35_like,
)

TOKENIZER_SIZE = 900


def _with_mtp(config: dict[str, Any]) -> dict[str, Any]:
    """A Qwen3.5 config whose checkpoint holds the layer that drafts."""
    return {**config, "text_config": {**config["text_config"], "mtp_num_hidden_layers": 1}}


MODELS: dict[str, dict[str, Any]] = {
    "deepseek-v2-lite": DEEPSEEK_V2_LITE,
    "deepseek-v3-4l-fp8": {
        **DEEPSEEK_V3,
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 1,
        "quantization_config": BLOCK_FP8,
    },
    "deepseek-v4-flash-8l": {**DEEPSEEK_V4_FLASH_8L, "quantization_config": BLOCK_FP8},
    "deepseek-v3-4l-mxfp4": {
        **DEEPSEEK_V3,
        "num_hidden_layers": 4,
        "quantization_config": {**BLOCK_FP8, "expert_dtype": "fp4"},
    },
    "deepseek-v3-3l-bf16": DEEPSEEK_V3,
    "qwen3.5-35b-a3b-20l": _with_mtp(qwen35_like(20)),
    "qwen3.5-35b-a3b-8l": qwen35_like(8),
    "deepseek-v2-tiny": {**DEEPSEEK_V2_LITE, "num_hidden_layers": 2},
    "qwen3.5-tiny": qwen35_like(4),
}


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """``config`` and a tokenizer in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    write_tokenizer(folder, TOKENIZER_SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Default: all of {', '.join(MODELS)}")
    args = parser.parse_args()
    unknown = sorted(set(args.names) - set(MODELS))
    if unknown:
        parser.error(f"unknown model {', '.join(unknown)}: there are {', '.join(MODELS)}")
    for name in args.names or MODELS:
        write_model(args.out_dir / name, MODELS[name])
        print(args.out_dir / name)


if __name__ == "__main__":
    main()

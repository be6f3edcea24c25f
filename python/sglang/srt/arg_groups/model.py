"""The settings of the model, its weights and its types."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sglang.srt.arg_groups.fields import flag
from sglang.srt.arg_groups.upstream import UPSTREAM_ONLY

MODEL = "Model and tokenizer"
DTYPE = "Quantization and data type"


@dataclass(frozen=True)
class ModelArgs:
    """The part of ``ServerArgs`` that chooses what is served, and in which types."""

    model_path: str = flag(
        "",
        "Folder of a model in Hugging Face format, or an id such as `deepseek-ai/DeepSeek-V3` that the local "
        "Hugging Face cache contains; nothing is downloaded. Or one of the small models of the package: "
        "deepseek-v3-tiny, deepseek-v2-tiny, qwen3.5-moe-tiny, deepseek-v4-tiny, deepseek-v3-tools-tiny.",
        MODEL,
        aliases=("--model",),
        metavar="FOLDER",
        auto="deepseek-v3-tiny",
    )
    revision: str | None = flag(
        None, "Branch, tag or commit of a model given by its id; it must be in the cache.", MODEL, auto="main"
    )
    tokenizer_path: str | None = flag(
        None, "Folder that holds tokenizer.json.", MODEL, auto="the model path", metavar="FOLDER"
    )
    skip_tokenizer_init: bool = flag(
        False, "Load no tokenizer: requests contain input_ids, and replies contain output ids, no text.", MODEL
    )
    load_format: str = flag(
        "auto",
        "Where weights come from. auto and safetensors read the files of the folder; dummy creates random weights.",
        MODEL,
        choices=("auto", "safetensors", "dummy"),
        upstream_only=UPSTREAM_ONLY["load_format"],
    )
    context_length: int | None = flag(
        None, "Most tokens of a request, prompt and output.", MODEL, minimum=1, human=True, auto="the model's limit"
    )
    json_model_override_args: str = flag(
        "{}", "JSON object that overrides keys of the model's config.json, as '{\"num_hidden_layers\": 4}'.", MODEL
    )
    dtype: str = flag(
        "auto",
        "Type of weights and activations. auto is the checkpoint's type, and float32 on CPU. half is float16, and "
        "float is float32.",
        DTYPE,
        choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
    )
    quantization: str | None = flag(
        None,
        "fp8 turns matrices into 8-bit floats in 128x128 blocks as they load. Checkpoints in fp8 and of Quark need "
        "no flag.",
        DTYPE,
        choices=("fp8", "quark"),
        upstream_only=UPSTREAM_ONLY["quantization"],
        auto="the checkpoint's format",
    )
    dequantize_mxfp4: bool = flag(
        False,
        "Dequantize MXFP4 experts as they load: they take four times the memory. Without, they keep four bits.",
        DTYPE,
    )
    kv_cache_dtype: str = flag(
        "auto",
        "Type of cached keys, values and latents: auto is that of activations; fp8_e4m3 has 3 bits of fraction.",
        DTYPE,
        choices=("auto", "bfloat16", "fp8_e4m3"),
        upstream_only=("fp8_e5m2", "fp4_e2m1"),
    )

    def model_overrides(self) -> dict[str, Any]:
        """``json_model_override_args`` as a mapping."""
        overrides: dict[str, Any] = json.loads(self.json_model_override_args)
        return overrides

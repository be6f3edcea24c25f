"""Which class serves which ``architectures`` string of a config.json."""

from __future__ import annotations

import importlib

from sglang.srt.models.checkpoint_model import CheckpointModel

# architecture -> (module below sglang.srt.models, class). Two names may share a backbone but each has an lm_head.
MODEL_CLASSES: dict[str, tuple[str, str]] = {
    "DeepseekV2ForCausalLM": ("deepseek_v2", "DeepseekV2ForCausalLM"),
    "DeepseekV3ForCausalLM": ("deepseek_v2", "DeepseekV3ForCausalLM"),
    "Qwen3_5ForCausalLM": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "Qwen3_5MoeForCausalLM": ("qwen3_5", "Qwen3_5MoeForConditionalGeneration"),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5", "Qwen3_5MoeForConditionalGeneration"),
}


def resolve_model_class(architecture: str) -> type[CheckpointModel]:
    """The model class of ``architecture``; raises ValueError that names the supported ones."""
    if architecture not in MODEL_CLASSES:
        raise ValueError(f"architecture {architecture!r} is not supported. Supported: {', '.join(MODEL_CLASSES)}.")
    module_name, class_name = MODEL_CLASSES[architecture]
    module = importlib.import_module(f"sglang.srt.models.{module_name}")
    model_class: type[CheckpointModel] = getattr(module, class_name)
    return model_class

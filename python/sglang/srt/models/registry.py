"""Which class serves which ``architectures`` string of a config.json."""

from __future__ import annotations

import importlib
from typing import Any

from sglang.srt.models.checkpoint_model import CheckpointModel
from sglang.srt.models.draft_model import DraftModel

# architecture -> (module below sglang.srt.models, class). Two names may share a backbone but each has an lm_head.
MODEL_CLASSES: dict[str, tuple[str, str]] = {
    "DeepseekV2ForCausalLM": ("deepseek_v2", "DeepseekV2ForCausalLM"),
    "DeepseekV3ForCausalLM": ("deepseek_v2", "DeepseekV3ForCausalLM"),
    "DeepseekV4ForCausalLM": ("deepseek_v4", "DeepseekV4ForCausalLM"),
    "Qwen3_5ForCausalLM": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "Qwen3_5MoeForCausalLM": ("qwen3_5", "Qwen3_5MoeForConditionalGeneration"),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5", "Qwen3_5MoeForConditionalGeneration"),
}
# The same for the MTP layer of a checkpoint, which drafts for the model.
DRAFT_CLASSES: dict[str, tuple[str, str]] = {
    "DeepseekV3ForCausalLM": ("deepseek_nextn", "DeepseekV3ForCausalLMNextN"),
    "DeepseekV4ForCausalLM": ("deepseek_v4_nextn", "DeepseekV4ForCausalLMNextN"),
    "Qwen3_5ForCausalLM": ("qwen3_5_mtp", "Qwen3_5ForCausalLMMTP"),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5_mtp", "Qwen3_5ForCausalLMMTP"),
    "Qwen3_5MoeForCausalLM": ("qwen3_5_mtp", "Qwen3_5ForCausalLMMTP"),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5_mtp", "Qwen3_5ForCausalLMMTP"),
}


def resolve_model_class(architecture: str) -> type[CheckpointModel]:
    """The model class of ``architecture``; raises ValueError that names the supported ones."""
    if architecture not in MODEL_CLASSES:
        raise ValueError(f"architecture {architecture!r} is not supported. Supported: {', '.join(MODEL_CLASSES)}.")
    model_class: type[CheckpointModel] = _import(*MODEL_CLASSES[architecture])
    return model_class


def resolve_draft_class(architecture: str) -> type[DraftModel]:
    """The class of the MTP layer of ``architecture``; raises ValueError that names those that have one."""
    if architecture not in DRAFT_CLASSES:
        raise ValueError(
            f"architecture {architecture!r} has no MTP layer. Those that have: {', '.join(DRAFT_CLASSES)}."
        )
    draft_class: type[DraftModel] = _import(*DRAFT_CLASSES[architecture])
    return draft_class


def _import(module_name: str, class_name: str) -> Any:
    return getattr(importlib.import_module(f"sglang.srt.models.{module_name}"), class_name)

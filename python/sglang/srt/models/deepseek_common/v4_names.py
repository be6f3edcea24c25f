"""Names of DeepSeek V4's tensors: as published, as transformers saves them, and as the model's modules have them."""

from __future__ import annotations

import re

# Tried in order on a whole name, every rule once; "model." before the layers is transformers'.
_RULES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^(?:model\.)?embed(?:_tokens)?\.weight$", "model.embed_tokens.weight"),
        (r"^head\.", "lm_head."),
        (r"^(?:model\.)?norm\.weight$", "model.norm.weight"),
        (r"^(?:model\.)?hc_head(?:_|\.hc_)(fn|base|scale)$", r"model.hc_head.\1"),
        (r"^(?:model\.)?layers\.", "model.layers."),
        (r"^(model\.layers\.\d+)\.hc_(attn|ffn)_(fn|base|scale)$", r"\1.hc_\2.\3"),
        (r"^(model\.layers\.\d+)\.attn_norm\.", r"\1.input_layernorm."),
        (r"^(model\.layers\.\d+)\.ffn_norm\.", r"\1.post_attention_layernorm."),
        (r"^(model\.layers\.\d+)\.attn\.", r"\1.self_attn."),
        (r"^(model\.layers\.\d+)\.ffn\.", r"\1.mlp."),
        (r"\.self_attn\.norm\.", ".self_attn.kv_norm."),
        (r"\.self_attn\.attn_sink$", ".self_attn.sinks"),
        (r"\.ape$", ".position_bias"),
        (r"\.mlp\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.mlp\.gate\.tid2eid$", ".mlp.topk.tid2eid"),
        (r"(experts(?:\.\d+)?)\.w1\.", r"\1.gate_proj."),
        (r"(experts(?:\.\d+)?)\.w3\.", r"\1.up_proj."),
        (r"(experts(?:\.\d+)?)\.w2\.", r"\1.down_proj."),
        # The scales of a matrix; those of hyper-connections have got names of their own above.
        (r"^(model\.layers\.\d+\.(?:self_attn|mlp)\..+)\.scale$", r"\1.weight_scale_inv"),
    )
)
_DRAFT = re.compile(r"^(?:model\.)?mtp\.")


def deepseek_v4_name(name: str) -> str | None:
    """The name below the model of the file's tensor ``name``; None for tensors of layers that draft."""
    if _DRAFT.match(name):
        return None
    for pattern, replacement in _RULES:
        name = pattern.sub(replacement, name, count=1)
    return name

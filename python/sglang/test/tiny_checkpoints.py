"""Tiny random checkpoints of the served architectures, built and saved by transformers: the truth of parity tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_QWEN_ROPE = {
    "rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2],
    "mrope_interleaved": True,
}  # fmt: skip
_QWEN_DENSE: dict[str, Any] = {
    "model_type": "qwen3_5_text", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False,
    "attn_output_gate": True, "full_attention_interval": 4, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "intermediate_size": 256,
    "mamba_ssm_dtype": "float32", "rope_parameters": _QWEN_ROPE,
}  # fmt: skip
_QWEN_MOE = {
    **{key: value for key, value in _QWEN_DENSE.items() if key != "intermediate_size"},
    "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "num_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32,
    "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
_DEEPSEEK_V2: dict[str, Any] = {
    "model_type": "deepseek_v2", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256,
    "moe_intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 2, "n_routed_experts": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax", "topk_method": "greedy", "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 1.0, "q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "max_position_embeddings": 2560, "rms_norm_eps": 1e-6,
    "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False, "rope_parameters": _YARN,
}  # fmt: skip

_DEEPSEEK_V2_GROUPS: dict[str, Any] = {
    **_DEEPSEEK_V2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
    "routed_scaling_factor": 16.0, "q_lora_rank": 48,
}  # fmt: skip

# Every mechanism is at work in 700 tokens: two pages, five windows of 128, more entries than top-k, clamps that bite.
# With fewer index heads scores would tie at zero, among which transformers chooses by the row's length.
_DEEPSEEK_V4: dict[str, Any] = {
    "model_type": "deepseek_v4", "vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64, "partial_rotary_factor": 0.25,
    "q_lora_rank": 64, "o_groups": 4, "o_lora_rank": 32, "sliding_window": 128,
    "layer_types": [
        "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
        "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "index_n_heads": 32, "index_head_dim": 32, "index_topk": 16, "moe_intermediate_size": 64, "n_routed_experts": 16,
    "num_experts_per_tok": 4, "n_shared_experts": 1, "mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 4,
    "swiglu_limit": 0.5, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "routed_scaling_factor": 1.5,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "compress_rope_theta": 160000.0,
    "rope_parameters": {"rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                        "original_max_position_embeddings": 256},
    "num_nextn_predict_layers": 1,
}  # fmt: skip

# The square heads of the other Qwen configs cannot tell a [V, K] state from a [K, V] one; "q35moe-ns" can.
# With as many experts as groups a token, the best experts are in the best groups anyway; "dsv2g-k3" sees the limit.
TINY_CONFIGS: dict[str, dict[str, Any]] = {
    "q35": _QWEN_DENSE,
    "q35moe": _QWEN_MOE,
    "q35moe-ns": {**_QWEN_MOE, "linear_value_head_dim": 48, "linear_num_value_heads": 6},
    "dsv2": _DEEPSEEK_V2,
    "dsv2g": _DEEPSEEK_V2_GROUPS,
    "dsv2g-k3": {**_DEEPSEEK_V2_GROUPS, "num_experts_per_tok": 3},
    "dsv3": {
        **_DEEPSEEK_V2, "model_type": "deepseek_v3", "n_shared_experts": 1, "n_routed_experts": 16,
        "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "q_lora_rank": 48, "num_nextn_predict_layers": 1,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}  # fmt: skip

# Served in pages of one size, and not by the backends of the others.
COMPRESSED_CONFIGS: dict[str, dict[str, Any]] = {
    "dsv4": _DEEPSEEK_V4,
    # Head sizes of real models.
    "dsv4-k": {
        **_DEEPSEEK_V4, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 16, "head_dim": 512,
        "partial_rotary_factor": 0.125, "index_head_dim": 128, "index_topk": 512,
        "layer_types": _DEEPSEEK_V4["layer_types"][:3], "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "max_position_embeddings": 65536,
        "rope_parameters": {**_DEEPSEEK_V4["rope_parameters"], "original_max_position_embeddings": 4096},
    },
}  # fmt: skip

# The same control flow at the head sizes that GPU kernels meet in real models.
KERNEL_SIZED_CONFIGS: dict[str, dict[str, Any]] = {
    "dsv3-k": {
        **TINY_CONFIGS["dsv3"], "hidden_size": 256, "moe_intermediate_size": 128, "num_attention_heads": 16,
        "num_key_value_heads": 16, "q_lora_rank": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 4096,
    },
    "q35moe-k": {
        **_QWEN_MOE, "hidden_size": 256, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "rope_parameters": {**_QWEN_ROPE, "mrope_section": [11, 11, 10]},
    },
}  # fmt: skip


def whole_config(name: str) -> dict[str, Any]:
    """The tiny config ``name`` with all keys that a folder has, transformers' defaults included."""
    from transformers import AutoConfig

    settings = {**TINY_CONFIGS, **COMPRESSED_CONFIGS, **KERNEL_SIZED_CONFIGS}[name]
    whole: dict[str, Any] = AutoConfig.for_model(**settings).to_dict()
    return whole


def build_hf_model(config: dict[str, Any], seed: int = 0) -> Any:
    """transformers' model of ``config`` in float32 with numbers that make parity tests see.

    Matrices are N(0, (0.5/sqrt(fan_in))^2), vectors get 0.1 N(0, 1) added, the router's correction bias is
    0.1 N(0, 1); decay parameters (A_log, dt_bias) stay as transformers draws them. Its own filler gives near-uniform
    logits, under which a wrong model passes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(config)
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager", dtype=torch.float32).eval()
    fill_with_noise(model, seed + 1)
    return model


def fill_with_noise(model: torch.nn.Module, seed: int) -> None:
    """Give the parameters and the router biases of ``model`` the numbers that ``build_hf_model`` promises."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if type(model).__name__.startswith("DeepseekV4"):
            return _fill_deepseek_v4(model, generator)
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if name.endswith(("A_log", "dt_bias")):
                continue
            if param.dim() < 2:
                param.add_(noise, alpha=0.1)
            else:
                # Stacked experts are [E, out, in], convolutions [C, 1, W]: the last dimension is the fan-in of all.
                param.copy_(noise * (0.5 / param.shape[-1] ** 0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))


def _fill_deepseek_v4(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Norms near 1, scales of hyper-connections near 1, sinks and biases of slots N(0, 1), the rest N(0, 0.08^2);
    the tables of experts by token are random, and the router's correction bias is N(0, 0.3^2)."""
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        if "norm" in name:
            param.copy_(1 + 0.1 * noise)
        elif name.endswith("scale"):
            param.copy_(1 + 0.2 * noise)
        else:
            param.copy_(noise * (1.0 if name.endswith(("sinks", "position_bias")) else 0.08))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("tid2eid"):
            experts = model.config.n_routed_experts
            buffer.copy_(torch.rand(len(buffer), experts, generator=generator).argsort(-1)[:, : buffer.shape[1]])


def save_tiny_checkpoint(name: str, folder: str | Path, seed: int = 0, **overrides: Any) -> Any:
    """Save the checkpoint called ``name`` (with config ``overrides``) in ``folder``; returns its HF model."""
    model = build_hf_model({**TINY_CONFIGS, **COMPRESSED_CONFIGS, **KERNEL_SIZED_CONFIGS}[name] | overrides, seed)
    model.save_pretrained(str(folder), safe_serialization=True)
    return model


# What published fp8 checkpoints leave in the dtype of activations.
_NEVER_FP8 = ("embed_tokens", "lm_head", ".gate.", "shared_expert_gate", "conv1d", "in_proj_a", "in_proj_b", "eh_proj")


def quantize_tiny_checkpoint(source: str | Path, folder: str | Path) -> dict[str, torch.Tensor]:
    """Write ``source`` as an fp8 checkpoint in ``folder``; returns all its tensors in float32, scaled back.

    Written out here, block by block, so that what the product computes has something to be compared with.
    """
    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files, plain, skipped = {}, {}, []
    for name, tensor in load_file(source / "model.safetensors").items():
        plain[name] = tensor.float()
        if tensor.dim() != 2 or any(part in name for part in _NEVER_FP8):
            files[name] = tensor
            skipped += [name.removesuffix(".weight")] if tensor.dim() == 2 else []
            continue
        rows, columns = tensor.shape
        coarse = torch.zeros(rows, columns, dtype=torch.float8_e4m3fn)
        scales = torch.zeros(-(-rows // 128), -(-columns // 128))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                block = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
                scales[i, j] = plain[name][block].abs().max() / 448
                coarse[block] = (plain[name][block] / scales[i, j]).clamp(-448, 448).to(coarse.dtype)
                plain[name][block] = coarse[block].float() * scales[i, j]
        files[name], files[f"{name}_scale_inv"] = coarse, scales
    save_file(files, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        "modules_to_not_convert": skipped,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return plain

"""The published sizes of models that are tuned for and checked, as the content of their config.json.

The Qwen3.5 sizes are put together from public material: call what is measured with them "Qwen3.5-35B-like".
"""

from __future__ import annotations

from typing import Any

_YARN = {
    "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
_DEEPSEEK: dict[str, Any] = {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1,
    "first_k_dense_replace": 1, "hidden_act": "silu", "initializer_range": 0.02, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_layer_freq": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
DEEPSEEK_V2_LITE: dict[str, Any] = {
    **_DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "hidden_size": 2048,
    "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1, "n_routed_experts": 64,
    "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16, "num_key_value_heads": 16,
    "num_experts_per_tok": 6, "num_hidden_layers": 27, "q_lora_rank": None,
    "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "routed_scaling_factor": 1.0,
    "scoring_func": "softmax", "topk_method": "greedy", "vocab_size": 102400,
}  # fmt: skip
DEEPSEEK_V3: dict[str, Any] = {
    **_DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_group": 8, "topk_group": 4, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 3, "num_nextn_predict_layers": 0, "q_lora_rank": 1536,
    "rope_scaling": _YARN, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "vocab_size": 129280,
}  # fmt: skip
BLOCK_FP8 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
}  # fmt: skip


def qwen35_like(num_layers: int) -> dict[str, Any]:
    """Three linear-attention layers to one of full attention, the text model inside a conditional-generation config."""
    kinds = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(num_layers)]
    text = {
        "model_type": "qwen3_5_moe_text", "attention_bias": False, "attention_dropout": 0.0, "attn_output_gate": True,
        "eos_token_id": 1, "full_attention_interval": 4, "head_dim": 256, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 512, "layer_types": kinds, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "max_position_embeddings": 262144,
        "mlp_only_layers": [], "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16,
        "num_experts": 256, "num_experts_per_tok": 8, "num_hidden_layers": num_layers, "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 512, "tie_word_embeddings": False, "use_cache": True,
        "vocab_size": 248320, "dtype": "bfloat16", "rope_theta": 10000000,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_theta": 10000000, "rope_type": "default",
            "partial_rotary_factor": 0.25,
        },
    }  # fmt: skip
    vision = {
        "model_type": "qwen3_5_moe", "depth": 1, "hidden_size": 128, "num_heads": 2, "intermediate_size": 256,
        "in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
        "out_hidden_size": 2048, "num_position_embeddings": 64, "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [],
    }  # fmt: skip
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "image_token_id": 990,
        "video_token_id": 991, "vision_start_token_id": 992, "vision_end_token_id": 993,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "text_config": text, "vision_config": vision,
    }  # fmt: skip

"""Configurations and tokenizer files of the embedded models, written by `train_tiny_models.py`.

The tokenizer has no merges: token id = byte value, then the special tokens. Every id below the vocabulary size decodes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NUM_BYTES = 256
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>")
BOS, EOS, PAD, SYSTEM, USER, ASSISTANT = range(NUM_BYTES, NUM_BYTES + len(SPECIAL_TOKENS))
VOCAB_SIZE = 288

CHAT_TEMPLATE = """{{- bos_token -}}
{%- for message in messages -%}
  {%- if message['role'] in ['system', 'user', 'assistant'] -%}
    {{- '<|' + message['role'] + '|>' + message['content'] -}}
    {%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
  {%- else -%}
    {{- raise_exception('this model knows the roles system, user and assistant, not ' + message['role']) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.05,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}

_DEEPSEEK: dict[str, Any] = {
    **_COMMON,
    "intermediate_size": 384,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 16,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 1024,
    "beta_fast": 32,
    "beta_slow": 1,
}

# Every kind of layer, and fewer entries chosen than a prompt of 700 tokens has; with fewer heads of the indexer its
# scores would tie at zero.
DEEPSEEK_V4: dict[str, Any] = {
    **_COMMON,
    "model_type": "deepseek_v4",
    "num_hidden_layers": 5,
    "layer_types": [
        "sliding_attention",
        "compressed_sparse_attention",
        "heavily_compressed_attention",
        "compressed_sparse_attention",
        "sliding_attention",
    ],
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128},
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe", "moe"],
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "partial_rotary_factor": 0.25,
    "q_lora_rank": 64,
    "o_groups": 2,
    "o_lora_rank": 48,
    "sliding_window": 128,
    "index_n_heads": 32,
    "index_head_dim": 32,
    "index_topk": 32,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 256,
    },
    "num_nextn_predict_layers": 1,
}

MODEL_CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek-v3-tiny": {
        **_DEEPSEEK,
        "model_type": "deepseek_v3",
        "q_lora_rank": 64,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "deepseek-v2-tiny": {
        **_DEEPSEEK,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "qwen3.5-moe-tiny": {
        **_COMMON,
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attn_output_gate": True,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "mamba_ssm_dtype": "float32",
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    },
}


def encode(text: str) -> list[int]:
    """Token ids of text that names no special token: its UTF-8 bytes."""
    return list(text.encode("utf-8"))


def write_tokenizer_files(
    folder: Path, more_tokens: Sequence[str] = (), chat_template: str = CHAT_TEMPLATE, visible: Sequence[str] = ()
) -> None:
    """Write tokenizer.json, tokenizer_config.json (with the chat template) and generation_config.json.

    ``more_tokens`` stand after the special tokens; those that are ``visible`` are part of decoded text.
    """
    named = [*SPECIAL_TOKENS, *more_tokens]
    reserved = [f"<|reserved_{i}|>" for i in range(VOCAB_SIZE - NUM_BYTES - len(named))]
    added = [
        {"id": NUM_BYTES + i, "content": content, "special": content not in visible}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for i, content in enumerate([*named, *reserved])
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {symbol: byte for byte, symbol in enumerate(_byte_symbols())},
            "merges": [],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": SPECIAL_TOKENS[1],
        "pad_token": SPECIAL_TOKENS[2],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _COMMON["max_position_embeddings"],
        "chat_template": chat_template,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _byte_symbols() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (the GPT-2 alphabet)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(shifted)) for byte in range(NUM_BYTES)]

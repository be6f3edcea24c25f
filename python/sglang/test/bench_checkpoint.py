"""The checkpoint that CPU benches run: DeepSeek-V3's layout with real head sizes, small in everything else."""

from __future__ import annotations

import hashlib
import json
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sglang.test import tiny_tokenizers

SPECIAL_TOKENS = ("<s>", "</s>")  # ids 0 and 1
CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512,
    "moe_intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 4, "first_k_dense_replace": 1, "n_group": 4,
    "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True, "q_lora_rank": 128, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "attention_bias": False, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 0, "eos_token_id": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip


def fill_healthy(model: torch.nn.Module) -> None:
    """Norms 1, matrices N(0, 1/fan_in), router bias N(0, 0.05^2), each from a seed of its own name.

    Routing then spreads over the experts as in a trained model; with one narrow distribution for all it does not.
    """

    def normal(name: str, shape: torch.Size, scale: float) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale

    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() < 2:
                param.fill_(1.0)
            else:
                param.copy_(normal(name, param.shape, param.shape[-1] ** -0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(normal(name, buffer.shape, 0.05))


def write_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE, as the served families have: all bytes, then pairs of letters up to ``size`` tokens."""
    vocab = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    for char in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[char] = len(vocab)
    letters = string.ascii_lowercase
    pairs = [(first, second) for first in letters for second in letters][: max(0, size - len(vocab))]
    for first, second in pairs:
        vocab[first + second] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tiny_tokenizers.write_tokenizer(str(folder), tokenizer, eos_token=SPECIAL_TOKENS[1], model_max_length=131072)


def make_checkpoint(folder: Path | None = None) -> Path:
    """Save model (float32, by transformers) and tokenizer once; by default in the system's temporary folder."""
    import transformers

    key = hashlib.sha256((json.dumps(CONFIG, sort_keys=True) + transformers.__version__).encode()).hexdigest()[:12]
    target = folder or Path(tempfile.gettempdir()) / f"sglang-bench-deepseek-v3-{key}"
    if (target / "complete").is_file():
        return target
    settings = dict(CONFIG)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    fill_healthy(model)
    model.save_pretrained(str(target))
    write_tokenizer(target, CONFIG["vocab_size"])
    (target / "complete").touch()
    return target

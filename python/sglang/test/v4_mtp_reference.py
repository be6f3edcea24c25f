"""The MTP layer of DeepSeek V4 put together of transformers' own parts, which have none; and its checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sglang.test.tiny_checkpoints import save_tiny_checkpoint

# transformers' names in a layer -> those of the published checkpoint, longer ones first.
_NAMES = {
    "self_attn.q_a_proj": "attn.wq_a", "self_attn.q_a_norm": "attn.q_norm", "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv", "self_attn.kv_norm": "attn.kv_norm", "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b", "self_attn.sinks": "attn.attn_sink", "attn_hc.": "hc_attn_",
    "ffn_hc.": "hc_ffn_", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias", "mlp.gate.weight": "ffn.gate.weight",
    "mlp.shared_experts.gate_proj": "ffn.shared_experts.w1", "mlp.shared_experts.up_proj": "ffn.shared_experts.w3",
    "mlp.shared_experts.down_proj": "ffn.shared_experts.w2", "head.hc_": "hc_head_",
}  # fmt: skip


class V4Mtp(nn.Module):
    """``x = e_proj(enorm(embed(token))) + h_proj(hnorm(X))`` per stream, a layer without compression, head and norm.

    X are the target's streams before they are joined. The formula is that of DeepSeek's inference code.
    """

    def __init__(self, model: Any) -> None:
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as parts

        super().__init__()
        config = copy.deepcopy(model.config)
        config.layer_types, config.mlp_layer_types, config.num_hidden_layers = ["sliding_attention"], ["moe"], 1
        config._attn_implementation = "eager"
        width = config.hidden_size
        self.config, self._model = config, (model,)
        self.enorm, self.hnorm, self.norm = (parts.DeepseekV4RMSNorm(width, config.rms_norm_eps) for _ in range(3))
        self.e_proj, self.h_proj = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.layer, self.head = parts.DeepseekV4DecoderLayer(config, 0), parts.DeepseekV4HyperHead(config)

    @torch.inference_mode()
    def target_streams(self, ids: list[int]) -> torch.Tensor:
        """The target's streams [N, n, D] of ``ids``."""
        kept = []
        (model,) = self._model
        handle = model.model.hc_head.register_forward_pre_hook(lambda module, given: kept.append(given[0]))
        model(torch.tensor([ids]))
        handle.remove()
        return kept[0][0]

    @torch.inference_mode()
    def forward(self, next_ids: list[int], streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """next_ids [N], streams [N, n, D] of the tokens before -> log-probabilities [N, V] and streams [N, n, D]."""
        from transformers.masking_utils import create_sliding_window_causal_mask

        (model,) = self._model
        ids = torch.tensor([next_ids])
        embedded = model.model.embed_tokens(ids)
        x = self.e_proj(self.enorm(embedded)).unsqueeze(2) + self.h_proj(self.hnorm(streams[None]))
        positions = torch.arange(len(next_ids))[None]
        mask = create_sliding_window_causal_mask(
            config=self.config, inputs_embeds=embedded, attention_mask=None, cache=None, position_ids=positions
        )
        rope = model.model.rotary_emb
        turns = {kind: rope(embedded, position_ids=positions, layer_type=kind) for kind in ("main", "compress")}
        y = self.layer(
            x, input_ids=ids, position_embeddings=turns, position_ids=positions, attention_mask=mask, cache=None
        )
        logits: torch.Tensor = model.lm_head(self.norm(self.head(y)))
        return logits[0].log_softmax(-1), y[0]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Its tensors by the names of the published checkpoint."""
        found: dict[str, torch.Tensor] = {}
        for path, tensor in self.state_dict().items():
            name = _published(path.removeprefix("layer."))
            if name.startswith("mlp.experts."):
                for i, expert in enumerate(tensor):
                    parts = expert.chunk(2) if name.endswith("gate_up_proj") else (expert,)
                    for leaf, part in zip(("w1", "w3") if len(parts) == 2 else ("w2",), parts, strict=True):
                        found[f"mtp.0.ffn.experts.{i}.{leaf}.weight"] = part.clone()
                continue
            found[f"mtp.0.{name}"] = tensor.clone()
        return found


def _published(name: str) -> str:
    """A tensor's name in the published checkpoint, after the layer's; stacks of experts keep theirs."""
    for old, new in _NAMES.items():
        name = name.replace(old, new) if name.startswith(old) else name
    return name


def save_tiny_v4_mtp(folder: str | Path, seed: int = 0, **overrides: Any) -> tuple[Any, V4Mtp]:
    """Save the tiny DeepSeek V4 with an MTP layer in ``folder``; returns transformers' model and the layer."""
    model = save_tiny_checkpoint("dsv4", folder, seed, **overrides)
    mtp = V4Mtp(model).float().eval()
    generator = torch.Generator().manual_seed(seed + 3)
    with torch.no_grad():
        for name, tensor in [*mtp.named_parameters(), *mtp.named_buffers()]:
            noise = torch.randn(tensor.shape, generator=generator)
            near_one = "norm" in name or name.endswith("scale")
            tensor.copy_(1 + 0.1 * noise if near_one else noise * (1.0 if "sinks" in name else 0.08))
    weights = Path(folder) / "model.safetensors"
    tensors = load_file(weights) | mtp.tensors()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    return model, mtp


def load_v4_mtp(folder: str | Path) -> tuple[Any, V4Mtp]:
    """A folder's model in float32 as transformers reads it, and its MTP layer; a tensor that is missing raises."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    mtp = V4Mtp(model).float().eval()
    saved = load_file(Path(folder) / "model.safetensors")
    named = {name: saved[name].float() for name in mtp.tensors()}
    with torch.no_grad():
        for path, tensor in mtp.state_dict().items():
            name = _published(path.removeprefix("layer."))
            if name.startswith("mlp.experts."):
                leaves = ("w1", "w3") if name.endswith("gate_up_proj") else ("w2",)
                experts = [
                    torch.cat([named[f"mtp.0.ffn.experts.{i}.{leaf}.weight"] for leaf in leaves])
                    for i in range(len(tensor))
                ]
                tensor.copy_(torch.stack(experts))
            else:
                tensor.copy_(named[f"mtp.0.{name}"])
    return model, mtp


@torch.inference_mode()
def v4_share_accepted(
    model: Any, mtp: V4Mtp, prompts: Sequence[Sequence[int]], end: int, max_new_tokens: int, steps: int = 3
) -> tuple[list[float], float]:
    """How many greedy drafts at each place of a chain are accepted, offline; and tokens per cycle.

    Drafts after the end of an answer do not count. The first token of an answer is the prefill's.
    """
    accepted, drafted, cycles, made = [0] * steps, [0] * steps, 0, 0
    for prompt in prompts:
        answer = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=0
        )
        tokens, root = answer[0].tolist(), len(prompt)
        streams = mtp.target_streams(tokens)
        while root < len(tokens) - 1:
            given, rows, hits = tokens[1 : root + 1], streams[:root], 0
            for place in range(min(steps, len(tokens) - 1 - root)):
                logprobs, own = mtp(given, rows)
                given, rows = [*given, int(logprobs[-1].argmax())], torch.cat([rows, own[-1:]])
                hits += hits == place and given[-1] == tokens[root + 1 + place]
                drafted[place] += 1
                accepted[place] += hits > place
            step = min(hits + 1, len(tokens) - 1 - root)
            cycles, made, root = cycles + 1, made + step, root + step
    return [a / max(d, 1) for a, d in zip(accepted, drafted, strict=True)], made / max(cycles, 1)

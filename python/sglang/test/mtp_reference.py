"""transformers' MtpModel for tiny models: what its configs lack, and its tensors under the checkpoint's names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sglang.test.tiny_checkpoints import KERNEL_SIZED_CONFIGS, TINY_CONFIGS, build_hf_model, fill_with_noise

# transformers' names in an MTP layer -> the names that Qwen3.5 checkpoints give them; DeepSeek's differ in one.
_QWEN_NAMES = {
    "enorm.": "pre_fc_norm_embedding.",
    "hnorm.": "pre_fc_norm_hidden.",
    "eh_proj.": "fc.",
    "post_norm.": "norm.",
    "mtp_block.": "layers.0.",
}
_DEEPSEEK_NAMES = {"post_norm.": "shared_head.norm.", "mtp_block.": ""}


def offer_mtp(model: Any) -> None:
    """Let ``MtpModel(model, 1)`` be built and read, whatever the model's depth and family."""
    config = model.config
    if is_qwen(config):
        config.num_mtp_layers, config.mtp_layer_types, config.mtp_mlp_layer_types = 1, ["full_attention"], None
    else:
        config.num_nextn_predict_layers = 1
        model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{config.num_hidden_layers}\."]


def is_qwen(config: Any) -> bool:
    """Whether a transformers config is of the Qwen3.5 family."""
    return str(config.model_type).startswith("qwen3_5")


def layer_tensors(config: Any, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of an ``MtpLayer`` by the names that a checkpoint of ``config`` gives them, experts one by one."""
    tensors: dict[str, torch.Tensor] = {}
    for path, tensor in layer.state_dict().items():
        name = _checkpoint_name(config, path)
        if path.endswith("experts.gate_up_proj"):
            for i, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                stem = f"{name.removesuffix('gate_up_proj')}{i}."
                tensors |= {f"{stem}gate_proj.weight": gate.clone(), f"{stem}up_proj.weight": up.clone()}
        elif path.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            tensors |= {f"{stem}{i}.down_proj.weight": expert.clone() for i, expert in enumerate(tensor)}
        else:
            tensors[name] = tensor.clone()
    return tensors


def read_layer_tensors(config: Any, layer: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of ``layer_tensors``: set ``layer`` to what a checkpoint holds; KeyError where it lacks a tensor."""
    for path, own in layer.state_dict().items():
        name = _checkpoint_name(config, path)
        if path.endswith("experts.gate_up_proj"):
            stems = [f"{name.removesuffix('gate_up_proj')}{i}." for i in range(len(own))]
            pairs = ([tensors[f"{stem}{half}_proj.weight"] for half in ("gate", "up")] for stem in stems)
            found = torch.stack([torch.cat(pair) for pair in pairs])
        elif path.endswith("experts.down_proj"):
            stem = name.removesuffix("down_proj")
            found = torch.stack([tensors[f"{stem}{i}.down_proj.weight"] for i in range(len(own))])
        else:
            found = tensors[name]
        own.copy_(found)


def _checkpoint_name(config: Any, path: str) -> str:
    """What a checkpoint of ``config`` calls the tensor ``path`` of an ``MtpLayer``; experts are one there."""
    names = _QWEN_NAMES if is_qwen(config) else _DEEPSEEK_NAMES
    prefix = "mtp." if is_qwen(config) else f"model.layers.{config.num_hidden_layers}."
    old = next((old for old in names if path.startswith(old)), None)
    return prefix + (path if old is None else names[old] + path.removeprefix(old))


def save_tiny_mtp_checkpoint(name: str, folder: str | Path, seed: int = 0, **overrides: Any) -> tuple[Any, Any]:
    """Save the tiny checkpoint ``name`` with an MTP layer in ``folder``; returns its HF model and ``MtpModel``."""
    from transformers.modeling_layers import MtpModel

    folder = Path(folder)
    model = build_hf_model({**TINY_CONFIGS, **KERNEL_SIZED_CONFIGS}[name] | overrides, seed)
    model.save_pretrained(str(folder))
    offer_mtp(model)
    mtp = MtpModel(model, 1).float().eval()
    mtp.config._attn_implementation = "eager"
    fill_with_noise(mtp.layers, seed + 2)
    weights = folder / "model.safetensors"
    tensors = load_file(weights) | layer_tensors(model.config, mtp.layers[0])
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["mtp_num_hidden_layers" if is_qwen(model.config) else "num_nextn_predict_layers"] = 1
    path.write_text(json.dumps(config))
    return model, mtp


def load_mtp(folder: str | Path) -> tuple[Any, Any]:
    """A folder's model and its ``MtpModel`` in float32, as transformers reads them; a tensor that is missing raises."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_layers import MtpModel

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    offer_mtp(model)
    wanted = set(layer_tensors(model.config, MtpModel(model, 1).layers[0]))
    missing = wanted - load_file(Path(folder) / "model.safetensors").keys()
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(sorted(missing))}")
    return model, MtpModel.from_pretrained(model).float().eval()


@torch.inference_mode()
def share_accepted(
    model: Any, mtp: Any, prompts: Sequence[Sequence[int]], end: int, max_new_tokens: int, steps: int = 3
) -> tuple[list[float], float]:
    """How many greedy drafts at each place of a chain are accepted, by transformers alone; and tokens per cycle.

    Drafts after the end of an answer do not count. The first token of an answer is the prefill's.
    """
    from transformers.cache_utils import MtpCache

    accepted, drafted, cycles, made = [0] * steps, [0] * steps, 0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=end, pad_token_id=0)[
            0
        ]
        hidden, root = model.model(tokens[None]).last_hidden_state, len(prompt)
        while root < len(tokens) - 1:
            cache, last, hits = MtpCache(config=model.config.get_mtp_config()), hidden[:, :root], 0
            given, positions = tokens[None, 1 : root + 1], torch.arange(1, root + 1)[None]
            for place in range(min(steps, len(tokens) - 1 - root)):
                last = mtp.forward_layer(0, last, positions, cache, input_ids=given)[:, -1:]
                given, positions = mtp._project_to_logits(last).argmax(-1), positions[:, -1:] + 1
                hits += hits == place and int(given) == int(tokens[root + 1 + place])
                drafted[place] += 1
                accepted[place] += hits > place
            step = min(hits + 1, len(tokens) - 1 - root)
            cycles, made, root = cycles + 1, made + step, root + step
    return [a / max(d, 1) for a, d in zip(accepted, drafted, strict=True)], made / max(cycles, 1)

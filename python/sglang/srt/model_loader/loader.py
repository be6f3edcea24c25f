"""From a model config to a model with weights on its device."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from sglang.srt.arg_groups.stream_policy import NO_OVERLAP, StreamPlan
from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.dummy import iterate_dummy
from sglang.srt.model_loader.weight_utils import iterate_safetensors, tensor_dtypes
from sglang.srt.models.causal_lm import CausalLM
from sglang.srt.models.checkpoint_model import CheckpointModel, WeightLoadError
from sglang.srt.models.draft_model import DraftModel
from sglang.srt.models.registry import resolve_draft_class, resolve_model_class
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

# Keys in which a draft layer must equal its target: sizes of hidden rows, and of a layer's cached rows.
_SHARED_KEYS = (
    "hidden_size", "vocab_size", "kv_lora_rank", "qk_rope_head_dim", "num_key_value_heads", "head_dim"
)  # fmt: skip
LOAD_FORMATS = ("auto", "safetensors", "dummy")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make ``dtype`` the default of new floating-point tensors inside the block."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def build_model(
    model_config: ModelConfig, device: torch.device | str, streams: StreamPlan = NO_OVERLAP
) -> CheckpointModel:
    """The model of ``model_config`` in its dtype on ``device``, its weights not yet loaded."""
    model_class = resolve_model_class(model_config.architecture)
    model_config = _with_merged_names(model_config, model_class)
    with default_dtype(model_config.dtype), torch.device(device):
        return model_class(model_config, streams)


def _with_merged_names(config: ModelConfig, model_class: type[CheckpointModel]) -> ModelConfig:
    """``config`` whose quantisation lists the checkpoint modules that ``model_class`` merges."""
    if config.quant_config is None:
        return config
    merged = {name: tuple(part for part, _ in parts) for name, parts in model_class.packed_modules.items()}
    return replace(config, quant_config=replace(config.quant_config, merged=merged))


def load_model(
    model_config: ModelConfig,
    load_format: str = "auto",
    device: torch.device | str = "cpu",
    seed: int = 0,
    streams: StreamPlan = NO_OVERLAP,
) -> CheckpointModel:
    """The model of ``model_config`` in its dtype on ``device``, weights loaded.

    load_format: "auto" and "safetensors" read the folder; "dummy" draws numbers from ``seed`` and reads no weight.
    streams: which places of the model may overlap.
    Raises WeightLoadError when the checkpoint cannot be read or does not fit.
    """
    if load_format not in LOAD_FORMATS:
        raise ValueError(f"load format {load_format!r} is unknown; known: {', '.join(LOAD_FORMATS)}")
    started = time.perf_counter()
    model = build_model(model_config, device, streams)
    if load_format == "dummy":
        model.load_weights(iterate_dummy(model, seed), own_names=True)
    else:
        model.load_weights(iterate_safetensors(model_config.model_path))
    _log_loaded(model, device, started, load_format)
    return model.eval()


def build_draft_model(
    config: ModelConfig,
    target: nn.Module,
    device: torch.device | str,
    streams: StreamPlan = NO_OVERLAP,
    load_format: str = "auto",
) -> DraftModel:
    """The MTP layer of the folder of ``config`` as the draft model of ``target``, its weights not yet loaded.

    Its dtype is the target's, and its KV belongs to layer ``target.num_hidden_layers``. Matrices that a quantised
    checkpoint stores unquantised stay so; "dummy" reads no checkpoint. Raises ConfigError when the folder has no MTP
    layer that fits the target.
    """
    assert isinstance(target, CausalLM), "every served model is one"
    draft_class = resolve_draft_class(config.architecture)
    _check_draft(config, target)
    config = replace(_with_merged_names(config, draft_class), dtype=target.model.embed_tokens.weight.dtype)
    if load_format != "dummy":
        config = _as_stored(config, draft_class.checkpoint_prefix(config))
    with default_dtype(config.dtype), torch.device(device):
        return draft_class(config, target, target.num_hidden_layers, streams)


def load_draft_model(
    config: ModelConfig,
    args: ServerArgs,
    target: nn.Module,
    device: torch.device | str = "cpu",
    streams: StreamPlan = NO_OVERLAP,
) -> DraftModel:
    """``build_draft_model`` with its weights, or dummies by ``args``. Raises ConfigError or WeightLoadError."""
    started = time.perf_counter()
    draft = build_draft_model(config, target, device, streams, args.load_format)
    if args.load_format == "dummy":
        draft.load_weights(iterate_dummy(draft, args.random_seed or 0), own_names=True)
    else:
        draft.load_weights(iterate_safetensors(config.model_path, lambda name: draft.checkpoint_name(name) is not None))
    _log_loaded(draft, device, started, args.load_format)
    return draft.eval()


def draft_config(args: ServerArgs, config: ModelConfig) -> ModelConfig:
    """The config of the folder whose MTP layer drafts for the model of ``config``: its own, or another."""
    folder = args.speculative_draft_model_path
    if folder is None or folder == args.model_path:
        return config
    dtype = str(config.dtype).removeprefix("torch.")
    return ModelConfig.from_path(folder, dtype=dtype, context_length=config.context_len)


def _check_draft(config: ModelConfig, target: CausalLM) -> None:
    refusal = config.text.mtp_refusal
    if refusal:
        raise ConfigError(refusal, source=config.model_path)
    pairs = ((key, getattr(target.text, key, None), getattr(config.text, key, None)) for key in _SHARED_KEYS)
    problems = [f"key {key} is {own}, and that of the model {its}" for key, its, own in pairs if its != own]
    if problems:
        raise ConfigError(*problems, "the MTP layer belongs to another model", source=config.model_path)


def _as_stored(config: ModelConfig, prefix: str) -> ModelConfig:
    """``config`` whose quantisation skips the matrices named ``prefix`` that the checkpoint stores unquantised."""
    dtypes = tensor_dtypes(config.model_path, lambda name: name.startswith(prefix))
    if not dtypes:
        raise WeightLoadError(
            f"{config.model_path} contains no tensor {prefix}*, although its config.json names an MTP layer."
        )
    quant_config = config.quant_config
    if quant_config is None or quant_config.on_load:
        return config
    scales = quant_config.default.scale_suffix
    matrices = ((name.removesuffix(".weight"), dtype) for name, dtype in dtypes.items() if not name.endswith(scales))
    plain = {name for name, dtype in matrices if dtype in ("BF16", "F16", "F32", "F64")}
    modules = {re.sub(r"(\.experts)\.\d+\..*|(\.experts)\.\w+_proj", r"\1\2", name) for name in plain}
    skipped = (*quant_config.skipped, *map(re.escape, sorted(modules)))
    return replace(config, quant_config=replace(quant_config, skipped=skipped))


def _log_loaded(model: nn.Module, device: torch.device | str, started: float, load_format: str) -> None:
    storages = {storage._cdata: storage for storage in (param.untyped_storage() for param in model.parameters())}
    num_bytes = sum(storage.nbytes() for storage in storages.values())
    logger.info(
        "loaded %s: %.2f GB on %s in %.1f s (%s)",
        type(model).__name__, num_bytes / 1e9, device, time.perf_counter() - started, load_format,
    )  # fmt: skip

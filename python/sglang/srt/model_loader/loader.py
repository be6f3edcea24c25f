"""From a model config to a model with weights on its device."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.model_loader.dummy import iterate_dummy
from sglang.srt.model_loader.weight_utils import iterate_safetensors
from sglang.srt.models.checkpoint_model import CheckpointModel
from sglang.srt.models.registry import resolve_model_class
from sglang.srt.utils.stream_policy import SERIAL_PLAN, StreamPlan

logger = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "safetensors", "dummy")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating tensors take ``dtype`` inside the block."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


def build_model(
    model_config: ModelConfig, device: torch.device | str, streams: StreamPlan = SERIAL_PLAN
) -> CheckpointModel:
    """The model of ``model_config`` in its dtype on ``device``, its weights not yet loaded."""
    model_class = resolve_model_class(model_config.architecture)
    if model_config.quant_config is not None:
        merged = {name: tuple(part for part, _ in parts) for name, parts in model_class.packed_modules.items()}
        model_config = replace(model_config, quant_config=replace(model_config.quant_config, merged=merged))
    with default_dtype(model_config.dtype), torch.device(device):
        return model_class(model_config, streams)


def load_model(
    model_config: ModelConfig,
    load_format: str = "auto",
    device: torch.device | str = "cpu",
    seed: int = 0,
    streams: StreamPlan = SERIAL_PLAN,
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
    dummy = load_format == "dummy"
    model.load_weights(iterate_dummy(model, seed) if dummy else iterate_safetensors(model_config.model_path))
    storages = {storage._cdata: storage for storage in (param.untyped_storage() for param in model.parameters())}
    num_bytes = sum(storage.nbytes() for storage in storages.values())
    logger.info(
        "loaded %s: %.2f GB on %s in %.1f s (%s)",
        type(model).__name__, num_bytes / 1e9, device, time.perf_counter() - started, load_format,
    )  # fmt: skip
    return model.eval()

"""The config of the served model, as the settings have it."""

from __future__ import annotations

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs


def read_model_config(args: ServerArgs, platform_kind: str, use_generation_defaults: bool = False) -> ModelConfig:
    """The config in the folder ``args.model_path``; see ``ModelConfig.from_path``. Raises ConfigError."""
    return ModelConfig.from_path(
        args.model_path,
        json_model_override_args=args.model_overrides(),
        context_length=args.context_length,
        dtype=args.dtype,
        quantization=args.quantization,
        dequantize_mxfp4=args.dequantize_mxfp4,
        kv_cache_dtype=args.kv_cache_dtype,
        platform_kind=platform_kind,
        use_generation_defaults=use_generation_defaults,
    )

"""Formats of weights: how a layer keeps them, takes them from a checkpoint, and multiplies by them."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence

from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.quantization import BLOCK, QuantConfig
from sglang.srt.layers.quantization.fp8 import Fp8Method
from sglang.srt.layers.quantization.unquant import UnquantizedMethod, WeightMethod
from sglang.srt.layers.weights import Shards

__all__ = ["WeightMethod", "experts_method", "linear_method"]

logger = logging.getLogger(__name__)


def linear_method(
    quant_config: QuantConfig | None, prefix: str, shards: Shards, dequantize: bool = False
) -> WeightMethod:
    """The format of the linear layer ``prefix``; ``dequantize`` asks for plain weights whatever the checkpoint holds.

    A matrix whose part on this rank is not cut at blocks is kept plain, and the log says so.
    """
    if quant_config is None:
        return UnquantizedMethod()
    if dequantize or quant_config.skips(prefix):
        return UnquantizedMethod(takes_scale=True)
    if shards.in_blocks(BLOCK) is None:
        _say_once(re.sub(r"\.\d+\.", ".*.", prefix), shards.rows, shards.columns)
        return UnquantizedMethod(takes_scale=True)
    return Fp8Method(quant_config.on_load)


def experts_method(quant_config: QuantConfig | None, prefix: str, matrices: Sequence[Shards]) -> WeightMethod:
    """The format of the routed experts ``prefix``; raises ConfigError where their blocks cannot be split."""
    if quant_config is None:
        return UnquantizedMethod()
    if quant_config.skips(prefix):
        return UnquantizedMethod(takes_scale=True)
    if any(shards.in_blocks(BLOCK) is None for shards in matrices):
        sizes = " and ".join(f"[{shards.rows}, {shards.columns}]" for shards in matrices)
        raise ConfigError(
            f"{prefix}: matrices {sizes} of an expert on this rank are not cut at fp8 blocks of {BLOCK}. Keep experts "
            "whole with --ep-size, lower --tp-size, or serve without quantisation."
        )
    return Fp8Method(quant_config.on_load)


@functools.cache
def _say_once(layers: str, rows: int, columns: int) -> None:
    logger.warning(
        "%s: [%d, %d] on this rank is not cut at fp8 blocks of %d; it is kept in the dtype of activations",
        layers, rows, columns, BLOCK,
    )  # fmt: skip

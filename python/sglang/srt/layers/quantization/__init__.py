"""Formats of weights: how a layer keeps them, takes them from a checkpoint, and multiplies by them."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence

from torch import nn

from sglang.srt.configs.errors import ConfigError
from sglang.srt.configs.quantization import FP8_BLOCKS, MXFP4, QuantConfig
from sglang.srt.distributed.parallel_state import ProcessGroupHandle
from sglang.srt.layers.quantization.fp8 import Fp8Method
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Method
from sglang.srt.layers.quantization.unquant import (
    Place,
    ProjectedRows,
    Rows,
    UnquantizedMethod,
    WeightMethod,
    plain_rows,
)
from sglang.srt.layers.weights import ShardedMatrix

__all__ = [
    "Place", "ProjectedRows", "Rows", "WeightMethod", "experts_method", "linear_method", "plain_rows",
    "warn_of_splits",
]  # fmt: skip

logger = logging.getLogger(__name__)


def linear_method(
    quant_config: QuantConfig | None, prefix: str, shards: ShardedMatrix, dequantize: bool = False
) -> WeightMethod:
    """The format of the linear layer ``prefix``; ``dequantize`` asks for plain weights whatever the checkpoint holds.

    A matrix whose part on this rank is not cut at blocks is kept plain, and the log says so; where that is due to the
    split alone, ``warn_of_splits`` does.
    """
    if quant_config is None:
        return UnquantizedMethod()
    known = quant_config.format_of(prefix)
    if dequantize or known is None:
        return UnquantizedMethod(known or quant_config.default)
    if known.name == MXFP4.name:
        _say_plain(_all_layers(prefix))
        return UnquantizedMethod(known)
    if shards.in_blocks(known.block) is None:
        by_split = shards.is_split_in_blocks(known.block)
        if not by_split:
            _say_once(_all_layers(prefix), shards.rows, shards.columns)
        return UnquantizedMethod(known, by_split=by_split)
    return Fp8Method(quant_config.on_load)


def experts_method(quant_config: QuantConfig | None, prefix: str, matrices: Sequence[ShardedMatrix]) -> WeightMethod:
    """The format of the routed experts ``prefix``; raises ConfigError where their blocks cannot be split."""
    if quant_config is None:
        return UnquantizedMethod()
    known = quant_config.format_of(prefix)
    if known is None:
        return UnquantizedMethod(quant_config.default)
    if any(shards.in_blocks(known.block) is None for shards in matrices):
        sizes = " and ".join(f"[{shards.rows}, {shards.columns}]" for shards in matrices)
        raise ConfigError(
            f"{prefix}: matrices {sizes} of an expert on this rank are not split at {known.name} blocks of "
            f"{known.block.rows}x{known.block.columns}. Keep experts whole with --ep-size, lower --tp-size, or serve "
            "without quantisation."
        )
    if known.name == MXFP4.name:
        return UnquantizedMethod(known) if quant_config.dequantize_mxfp4 else Mxfp4Method(known)
    return Fp8Method(quant_config.on_load)


def warn_of_splits(model: nn.Module, ranks: ProcessGroupHandle) -> list[str]:
    """Layers that some of ``ranks`` keep plain although a single rank would not; the first rank warns of them."""
    methods = ((name, getattr(module, "quant_method", None)) for name, module in model.named_modules())
    mine = {_all_layers(name) for name, method in methods if getattr(method, "by_split", False)}
    all_ranks = ranks.all_gather_text(",".join(sorted(mine)), most=4096)
    found = sorted({name for names in all_ranks for name in names.split(",") if name})
    if found and ranks.rank == 0:
        logger.warning(
            "%s: the split over ranks cuts fp8 blocks of %d, so these are kept in the dtype of activations, where "
            "--tp-size 1 serves them in 8 bits: output may differ from that of one rank",
            ", ".join(found), FP8_BLOCKS.block.rows,
        )  # fmt: skip
    return found


def _all_layers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


@functools.cache
def _say_plain(layers: str) -> None:
    logger.warning("%s: MXFP4 is kept for routed experts; this is converted to plain weights while loading", layers)


@functools.cache
def _say_once(layers: str, rows: int, columns: int) -> None:
    logger.warning(
        "%s: [%d, %d] on this rank is not split at fp8 blocks of %d; it is kept in the dtype of activations",
        layers, rows, columns, FP8_BLOCKS.block.rows,
    )  # fmt: skip

"""Small pools for tests, without a model's config."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang.kernels.ops.attention.packed_rows import GROUP
from sglang.srt.configs.cache_layout import FULL, STATE, BufferSpec, CacheLayout, PoolSpec
from sglang.srt.mem_cache.memory_pool import CachePool, ModelPools, StateSlots


def pool_spec(
    name: str, unit: str, layers: Sequence[int], rows: dict[str, tuple[int, ...]], *dtypes: torch.dtype
) -> PoolSpec:
    """A pool whose buffers have the row shapes of ``rows``; one type for all of them, or one each."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes] * (len(rows) if len(dtypes) == 1 else 1)
    buffers = [BufferSpec(name, shape, dtype) for (name, shape), dtype in zip(rows.items(), names, strict=True)]
    return PoolSpec(name, unit, tuple(layers), tuple(buffers))


def kv_pools(
    size: int, page: int, dtype: torch.dtype, heads: int, dim: int, layers: Sequence[int], device: str = "cpu"
) -> ModelPools:
    """Keys and values of ``size`` tokens."""
    spec = pool_spec("kv", FULL, layers, {"k": (heads, dim), "v": (heads, dim)}, dtype)
    return ModelPools(CacheLayout((spec,)), {FULL: size}, page, device)


def latent_pools(
    size: int, page: int, dtype: torch.dtype, width: int, layers: Sequence[int], device: str = "cpu"
) -> ModelPools:
    """Latent rows of ``size`` tokens."""
    spec = pool_spec("latent", FULL, layers, {"latent": (width,)}, dtype)
    return ModelPools(CacheLayout((spec,)), {FULL: size}, page, device)


def state_slots(
    num_slots: int,
    layers: Sequence[int],
    conv: tuple[int, ...],
    ssm: tuple[int, ...],
    conv_dtype: torch.dtype,
    ssm_dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[StateSlots, CachePool]:
    """Recurrent states of ``num_slots`` sequences, and the slots' owner."""
    spec = pool_spec("gdn", STATE, layers, {"conv": conv, "ssm": ssm}, conv_dtype, ssm_dtype)
    pools = ModelPools(CacheLayout((spec,)), {STATE: num_slots}, 1, device)
    return StateSlots(pools), pools["gdn"]


def make_pages(
    num_pages: int, per_page: int, dim: int, tail: int | None, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of rows of which ``tail`` columns stay bfloat16, or of keys for None, as a pool has them; bytes are 0."""
    width = dim if tail is None else dim + tail
    scale_bytes = 4 if tail is None else -(-(dim - tail) // GROUP // 8) * 8
    page = -(-per_page * (width + scale_bytes) // width) * width
    pages = torch.zeros(num_pages, page + -page % 4, dtype=torch.uint8, device=device)
    values = pages[:, : per_page * width].view(dtype).unflatten(1, (per_page, width))
    scales = pages[:, per_page * width :][:, : per_page * scale_bytes]
    return values, scales.view(torch.float32) if tail is None else scales.unflatten(1, (per_page, scale_bytes))

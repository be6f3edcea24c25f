"""What an attention backend is, and how one is found by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.memory_pool import GDNStatePool, KVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(frozen=True)
class AttentionContext:
    """What a backend works on: the model's shapes and the pools of this rank."""

    model_config: ModelConfig
    req_to_token_pool: ReqToTokenPool
    kv_pool: KVPool
    state_pool: GDNStatePool | None
    page_size: int
    device: torch.device


class AttentionBackend(ABC):
    """Owns metadata, layouts and pool access of attention; the kernels that it calls are ops.

    ``prefers`` names the implementation that those ops take where they have it, None the first that fits.
    """

    prefers: str | None = None

    @abstractmethod
    def init_forward_metadata(self, fb: ForwardBatch) -> None:
        """Prepare what every layer of this step shares; called once before the layers."""

    @abstractmethod
    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, fb: ForwardBatch
    ) -> torch.Tensor:
        """Write k and v at ``fb.out_cache_loc``, attend. q [N, Hq*D], k [N, Hk*D], v [N, Hk*Dv] -> [N, Hq*Dv]."""


BackendFactory = Callable[[AttentionContext], AttentionBackend]
_BACKENDS: dict[str, BackendFactory] = {}


def register_attention_backend(name: str) -> Callable[[BackendFactory], BackendFactory]:
    """Class decorator: make a backend known as ``name`` (``--attention-backend``)."""

    def register(factory: BackendFactory) -> BackendFactory:
        if name in _BACKENDS:
            raise ValueError(f"attention backend {name!r} is registered twice")
        _BACKENDS[name] = factory
        return factory

    return register


def create_attention_backend(name: str, ctx: AttentionContext) -> AttentionBackend:
    """The backend called ``name``, over the pools of ``ctx``; raises ValueError that names the known ones."""
    if name not in _BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; known: {', '.join(sorted(_BACKENDS))}")
    return _BACKENDS[name](ctx)

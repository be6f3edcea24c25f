"""Attention backends; each registers itself by name when its module is imported."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from sglang.kernels.registry import REGISTRY
from sglang.srt.configs.cache_layout import STATE

if TYPE_CHECKING:
    from sglang.srt.layers.attention.base_attn_backend import AttentionContext
    from sglang.srt.model_executor.forward_batch_info import AttentionBackendLike

# Groups of the ops that backends call.
OP_GROUPS = frozenset({"attention", "compressed", "attention_state", "kv_cache", "prepare"})


def load_attention_backends() -> None:
    """Import every module of this package with ``_backend`` in its name, so that each backend is registered."""
    for module in pkgutil.iter_modules(__path__, __name__ + "."):
        if "_backend" in module.name.rpartition(".")[2]:
            importlib.import_module(module.name)


def make_attention_backend(name: str, context: AttentionContext) -> AttentionBackendLike:
    """The backend ``name`` over the pools of ``context``; hybrid models get the recurrent backend around it."""
    from sglang.srt.layers.attention.base_attn_backend import create_attention_backend
    from sglang.srt.layers.attention.hybrid_linear_attn_backend import GDNBackend, HybridLinearAttnBackend
    from sglang.srt.layers.attention.pool_backend import GqaBackend

    load_attention_backends()
    backend = create_attention_backend(name, context)
    REGISTRY.prefer(OP_GROUPS, backend.prefers)
    if not context.pools.layout.has(STATE):
        return backend
    assert isinstance(backend, GqaBackend), "recurrent layers stand among layers of grouped-query attention"
    tails = next((pool for pool in context.pools if pool.spec.name == "gdn_tail"), None)
    return HybridLinearAttnBackend(backend, GDNBackend(context.pools["gdn"], context.device, tails))

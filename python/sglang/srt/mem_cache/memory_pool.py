"""Device memory of served sequences: keys and values, latents, and recurrent states, addressed by slot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sglang.srt.mem_cache.allocator import SlotAccountingError


class _LayeredPool(ABC):
    """Buffers of some layers of a model, found by the layer's own id."""

    def __init__(self, layer_ids: Sequence[int], device: torch.device | str):
        self.layer_ids = tuple(layer_ids)
        self.device = torch.device(device)
        self._index = {layer_id: i for i, layer_id in enumerate(self.layer_ids)}
        if len(self._index) != len(self.layer_ids):
            raise ValueError(f"layer ids must differ, got {self.layer_ids}")

    def _row(self, layer_id: int) -> int:
        try:
            return self._index[layer_id]
        except KeyError:
            raise KeyError(f"{type(self).__name__} holds layers {self.layer_ids}, not layer {layer_id}") from None

    def _zeros(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(len(self.layer_ids), *shape, dtype=dtype, device=self.device)

    @abstractmethod
    def buffers(self) -> tuple[torch.Tensor, ...]:
        """The whole buffers, each [layers, rows, ...]."""

    def row_bytes(self) -> int:
        """Bytes of one row (a token, or a state slot) in all layers and buffers; the dummies are rows too."""
        return sum(buffer.nbytes // buffer.shape[1] for buffer in self.buffers())


class KVPool(_LayeredPool):
    """Base of pools with one row a token: ``size`` usable rows behind the dummy page 0.

    Rows S = size + page_size. Buffers start at zero so that the dummy rows are finite.
    """

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        layer_ids: Sequence[int],
        device: torch.device | str,
    ):
        super().__init__(layer_ids, device)
        self.size = size
        self.dtype = dtype
        self.num_rows = size + page_size

    def _new_buffer(self, *row_shape: int) -> torch.Tensor:
        return self._zeros(self.num_rows, *row_shape, dtype=self.dtype)


class MHATokenToKVPool(KVPool):
    """Keys and values of multi-head or grouped-query attention: k and v each [S, H, D] a layer."""

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        head_num: int,
        head_dim: int,
        layer_ids: Sequence[int],
        device: torch.device | str,
    ):
        super().__init__(size, page_size, dtype, layer_ids, device)
        self._k = self._new_buffer(head_num, head_dim)
        self._v = self._new_buffer(head_num, head_dim)

    def buffers(self) -> tuple[torch.Tensor, ...]:
        return self._k, self._v

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the layer's buffers, k and v [S, H, D]."""
        row = self._row(layer_id)
        return self._k[row], self._v[row]


class MLATokenToKVPool(KVPool):
    """Compressed rows of multi-head latent attention: [S, R + rope] a layer, latent first, rotated key part after."""

    def __init__(
        self,
        size: int,
        page_size: int,
        dtype: torch.dtype,
        kv_lora_rank: int,
        qk_rope_head_dim: int,
        layer_ids: Sequence[int],
        device: torch.device | str,
    ):
        super().__init__(size, page_size, dtype, layer_ids, device)
        self._latent = self._new_buffer(kv_lora_rank + qk_rope_head_dim)

    def buffers(self) -> tuple[torch.Tensor, ...]:
        return (self._latent,)

    def get_latent(self, layer_id: int) -> torch.Tensor:
        """View of the layer's buffer [S, R + rope]; its first R columns are the values of absorbed attention."""
        return self._latent[self._row(layer_id)]


class GDNStatePool(_LayeredPool):
    """Recurrent states of gated-delta-net layers, one slot a sequence, slot 0 the dummy of padded rows.

    A slot holds, for each layer, the convolution's last W - 1 input columns [C, W - 1] and the state [HV, V, K] (K
    fastest). Slots ``1 .. num_slots`` are handed out lowest first.
    """

    def __init__(
        self,
        num_slots: int,
        layer_ids: Sequence[int],
        conv_dim: int,
        conv_width: int,
        num_v_heads: int,
        v_head_dim: int,
        k_head_dim: int,
        conv_dtype: torch.dtype,
        ssm_dtype: torch.dtype,
        device: torch.device | str,
    ):
        super().__init__(layer_ids, device)
        if num_slots < 1 or conv_width < 2:
            raise ValueError(f"need num_slots >= 1 and conv_width >= 2, got {num_slots=} and {conv_width=}")
        self.size = num_slots
        self._conv = self._zeros(num_slots + 1, conv_dim, conv_width - 1, dtype=conv_dtype)
        self._ssm = self._zeros(num_slots + 1, num_v_heads, v_head_dim, k_head_dim, dtype=ssm_dtype)
        self.clear()

    def buffers(self) -> tuple[torch.Tensor, ...]:
        return self._conv, self._ssm

    def conv(self, layer_id: int) -> torch.Tensor:
        """View of the layer's convolution columns [num_slots + 1, C, W - 1]."""
        return self._conv[self._row(layer_id)]

    def ssm(self, layer_id: int) -> torch.Tensor:
        """View of the layer's states [num_slots + 1, HV, V, K]."""
        return self._ssm[self._row(layer_id)]

    def clear(self) -> None:
        """Take every slot back, whoever holds it."""
        self._free = list(range(self.size, 0, -1))
        self._in_use = bytearray(self.size + 1)

    def available_size(self) -> int:
        return len(self._free)

    def is_allocated(self, slot: int) -> bool:
        return 1 <= slot <= self.size and bool(self._in_use[slot])

    def alloc(self, zero: bool = True) -> int | None:
        """A slot, or None when all are taken; its state is zero unless the caller is about to overwrite it."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._in_use[slot] = 1
        if zero:
            self._conv[:, slot].zero_()
            self._ssm[:, slot].zero_()
        return slot

    def free(self, slot: int) -> None:
        self._check(slot)
        self._in_use[slot] = 0
        self._free.append(slot)

    def copy(self, src: int, dst: int) -> None:
        """Copy the state of slot ``src`` over that of slot ``dst``, all layers."""
        self._check(src)
        self._check(dst)
        self._conv[:, dst] = self._conv[:, src]
        self._ssm[:, dst] = self._ssm[:, src]

    def _check(self, slot: int) -> None:
        if not self.is_allocated(slot):
            raise SlotAccountingError(f"state slot {slot} is not handed out (slots 1..{self.size})")


@dataclass(frozen=True)
class ModelPools:
    """What the layers of one model keep; ``state_pool`` is None for a model without recurrent layers.

    Models that share a request table have pools of the same sizes: row i of each belongs to slot i.
    """

    kv_pool: KVPool
    state_pool: GDNStatePool | None

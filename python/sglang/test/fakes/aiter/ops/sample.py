"""FAKE greedy sampling, with the vendor's tail lanes."""

from __future__ import annotations

import torch

from aiter.errors import require
from sglang.srt.platforms import current_platform

_LANES = 16
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def greedy_sample(out: torch.Tensor, input: torch.Tensor) -> None:
    """Write each row's lowest index of the largest value. out int32 [B], input [B, V] float with dense rows.

    As the vendor's kernel does: NaN never wins, a row without a winner gives 0, and lanes past V in the last vector of
    16 read 0.0, so that a negative row of another width gives an id of V or more.
    """
    require(
        current_platform.is_default_stream(), "the kernel launches on the default stream, which is not the current one"
    )
    require(out.dtype == torch.int32 and out.shape == input.shape[:1], f"out must be int32 [B], got {out.dtype}")
    require(input.dtype in _FLOATS and input.ndim == 2, f"input must be float [B, V], got {input.dtype}")
    require(input.stride(1) == 1, "the kernel reads rows as dense")
    starts = (input.storage_offset() * input.element_size(), input.stride(0) * input.element_size())
    require(all(start % 4 == 0 for start in starts), "buffer loads drop the last two bits of an address")
    if input.numel() == 0:
        return
    padding = -input.shape[1] % _LANES
    values = torch.nn.functional.pad(input.float(), (0, padding))
    lowest = torch.finfo(torch.float32).min
    values = torch.where(values > lowest, values, lowest)  # NaN and -inf never replace the start
    best = values.amax(dim=1, keepdim=True)
    first = (values == best).to(torch.uint8).argmax(dim=1)
    out.copy_(torch.where(best.squeeze(1) == lowest, 0, first))

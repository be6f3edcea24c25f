"""Rows between the ranks of a group as bytes over torch.distributed, counts and complaints first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

INVALID_ID = 2**31 - 1
_FLOAT8_FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)


def poison(x: torch.Tensor) -> None:
    """Fill with what no consumer may use: NaN, or the largest int32."""
    if x.dtype == torch.int32:
        x.fill_(INVALID_ID)
    else:
        # All bits set is NaN in every float type but the FNUZ ones, whose NaN is minus zero.
        as_bytes(x).fill_(0x80 if x.dtype in _FLOAT8_FNUZ else 0xFF)


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Contiguous [N, ...] as uint8 [N, bytes of a row] over the same storage."""
    row_bytes = x.element_size()
    for size in x.shape[1:]:
        row_bytes *= size
    return x.view(torch.uint8).view(x.shape[0], row_bytes)


def agree(group: dist.ProcessGroup, counts: Sequence[int], complaint: Exception | None) -> list[list[int]]:
    """Every rank's ``counts``, in rank order. Where any rank complains, all raise, before a row has moved."""
    from mori.errors import VendorWouldCorrupt

    mine = torch.tensor([*counts, complaint is not None], dtype=torch.int64)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group)
    if complaint is not None:
        raise complaint
    rows = [entry.tolist() for entry in everyone]
    for rank, row in enumerate(rows):
        if row[-1]:
            raise VendorWouldCorrupt(f"rank {rank} made a call that is refused there; see its error")
    return [row[:-1] for row in rows]


def exchange_rows(
    group: dist.ProcessGroup, rows: Sequence[torch.Tensor], recv_counts: Sequence[int]
) -> list[torch.Tensor]:
    """``rows[d]`` uint8 [n, bytes] go to rank d; returns what each rank sent here, ``recv_counts`` rows each."""
    out = torch.empty(sum(recv_counts), rows[0].shape[1], dtype=torch.uint8)
    dist.all_to_all_single(out, torch.cat(list(rows)), list(recv_counts), [len(part) for part in rows], group=group)
    return list(out.split(list(recv_counts)))


def through_the_wire(x: torch.Tensor, quant_type: str, scale_dim: int) -> torch.Tensor:
    """x [N, H] as it reads after the combine codec ``quant_type`` (``scale_dim`` groups a row when blockwise)."""
    if quant_type == "none" or x.dtype != torch.bfloat16:
        return x
    limit = torch.finfo(torch.float8_e4m3fn).max
    if quant_type == "fp8_direct_cast":
        return x.float().clamp(-limit, limit).to(torch.float8_e4m3fn).to(x.dtype)
    groups = x.float().unflatten(1, (scale_dim, -1))
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / limit
    return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).to(x.dtype).view_as(x)

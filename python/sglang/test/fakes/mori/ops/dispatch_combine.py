"""FAKE ``EpDispatchCombineOp``: tokens to the ranks of their experts and back, over the group given to shmem."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from mori import shmem
from mori.errors import VendorWouldCorrupt
from mori.ops.addresses import last_combine_rows
from mori.ops.config import (
    EpDispatchCombineConfig,
    EpDispatchCombineKernelType,
    check_config,
    recv_rows_per_source,
)
from mori.ops.transport import agree, as_bytes, exchange_rows, poison, through_the_wire
from sglang.srt.platforms.host_device import kernel

_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)
_DISPATCH_DTYPES = (torch.bfloat16, torch.float32, *_FP8, torch.float4_e2m1fn_x2)
_COMBINE_DTYPES = (torch.bfloat16, torch.float32)
_TWO_PHASE = EpDispatchCombineKernelType.AsyncLL
_KEEPS_NEGATIVE_IDS = (EpDispatchCombineKernelType.AsyncLL, EpDispatchCombineKernelType.InterNodeV1LL)
_SINGLE_NODE = (EpDispatchCombineKernelType.IntraNode, EpDispatchCombineKernelType.IntraNodeLL)
_BLOCKWISE_KERNELS = (
    EpDispatchCombineKernelType.IntraNode,
    EpDispatchCombineKernelType.IntraNodeLL,
    EpDispatchCombineKernelType.AsyncLL,
)


@dataclass
class _Layout:
    """Where the rows of one dispatch went and came from."""

    indices: torch.Tensor
    # Which of this rank's tokens went to which rank, [T, W], and the tokens of each.
    goes: torch.Tensor
    sent_tokens: list[torch.Tensor]
    recv_counts: list[int]
    # Row i of the receive buffer is row order[i] of what arrived, rank after rank.
    order: torch.Tensor
    records: torch.Tensor

    @property
    def total(self) -> int:
        return sum(self.recv_counts)


class EpDispatchCombineOp:
    """One row per (token, destination rank); every method that moves rows is collective.

    A call that the vendor would answer with corrupted memory, miscounted rows or a hang raises VendorWouldCorrupt on
    every rank of the group.
    """

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        check_config(config)
        self._group = shmem.required_group()
        if (config.rank, config.world_size) != (self._group.rank(), self._group.size()):
            raise VendorWouldCorrupt(
                f"config says rank {config.rank} of {config.world_size}, the shmem group says rank "
                f"{self._group.rank()} of {self._group.size()}"
            )
        self.config = config
        self.local_expert_count = torch.zeros(config.num_experts_per_rank, dtype=torch.int32)
        self._state = "idle"
        self._layout: _Layout | None = None
        self._calls = 0
        rows, row_bytes = self.max_num_tokens_to_recv(), config.hidden_dim * config.max_token_type_size
        self._storage = {
            "out": torch.empty(rows * row_bytes, dtype=torch.uint8),
            "scales": torch.empty(rows * max(1, config.scale_dim * config.scale_type_size), dtype=torch.uint8),
            "combine_in": torch.empty(rows * row_bytes, dtype=torch.uint8),
            "combine_out": torch.empty(config.max_num_inp_token_per_rank * row_bytes, dtype=torch.uint8),
        }
        self._views: dict[tuple[Any, ...], torch.Tensor] = {}
        self._out_weights = torch.full((rows, config.num_experts_per_token), torch.nan, dtype=torch.float32)
        self._out_indices = torch.empty(rows, config.num_experts_per_token, dtype=torch.int32)
        self._combine_weights = torch.empty(
            config.max_num_inp_token_per_rank, config.num_experts_per_token, dtype=torch.float32
        )
        self._total_recv = torch.zeros(1, dtype=torch.int32)
        self._outputs: tuple[torch.Tensor | None, ...] = ()
        self._pending: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None = None

    # Sizes

    def max_num_tokens_to_recv(self) -> int:
        return self.config.world_size * recv_rows_per_source(self.config)

    def max_num_tokens_to_recv_per_rank(self) -> int:
        return recv_rows_per_source(self.config)

    def max_num_tokens_to_send(self) -> int:
        return self.config.world_size * self.config.max_num_inp_token_per_rank

    def max_num_tokens_to_send_per_rank(self) -> int:
        return self.config.max_num_inp_token_per_rank

    def decode_send_flat_idx(self, flat_idx: int) -> tuple[int, int]:
        return divmod(int(flat_idx), self.max_num_tokens_to_send())

    def get_launch_config(
        self, is_dispatch: bool = True, block_num: int = -1, rdma_block_num: int = -1, warp_per_block: int = -1
    ) -> tuple[int, int, int]:
        return block_num, rdma_block_num, warp_per_block

    def get_registered_combine_input_buffer(self, dtype: torch.dtype, hidden_dim: int = -1) -> torch.Tensor:
        width = self.config.hidden_dim if hidden_dim < 0 else hidden_dim
        return self._view("combine_in", dtype, self.max_num_tokens_to_recv(), width)

    def reset(self) -> None:
        """Nothing: the vendor's has no body either."""

    # To the experts

    @kernel
    def dispatch(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
        call_local_expert_count: bool = False,
        *,
        routing: object | None = None,
        return_routing: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        if routing is not None or return_routing:
            raise NotImplementedError("the fake has no routing handles")
        complaint = self._dispatch_complaint(input, weights, scales, indices)
        masks = self._destinations(indices) if complaint is None else [torch.zeros(0, dtype=torch.bool)]
        counts = [int(mask.sum()) for mask in masks] if complaint is None else [0] * self.config.world_size
        matrix = agree(self._group, counts, complaint)
        self._refuse_overflow(matrix)
        has_scales = scales is not None and self.config.scale_dim > 0
        parts = [as_bytes(input), as_bytes(indices)]
        parts += [as_bytes(weights)] if weights is not None else []
        parts += [as_bytes(scales)] if has_scales else []
        token_ids = torch.arange(input.shape[0], dtype=torch.int32).unsqueeze(1)
        packed = torch.cat([*parts, as_bytes(token_ids)], dim=1)
        sent_tokens = [mask.nonzero().squeeze(1) for mask in masks]
        recv_counts = [row[self.config.rank] for row in matrix]
        arrived = exchange_rows(self._group, [packed[tokens] for tokens in sent_tokens], recv_counts)
        self._calls += 1
        order = self._row_order(recv_counts)
        goes = torch.stack(masks, dim=1)
        self._layout = _Layout(indices.clone(), goes, sent_tokens, recv_counts, order, torch.cat(arrived)[order])
        rows = self.max_num_tokens_to_recv()
        out_scales = None
        if has_scales:
            assert scales is not None
            out_scales = self._view("scales", scales.dtype, rows, self.config.scale_dim)
        out = self._view("out", input.dtype, rows, input.shape[1])
        self._outputs = (out, self._out_weights if weights is not None else None, out_scales, self._out_indices)
        for view in (out, self._out_weights, out_scales, self._out_indices):
            if view is not None:
                poison(view)
        self._total_recv.zero_()
        if self.config.kernel_type is _TWO_PHASE:
            self._state = "sent"
        else:
            self._deliver(call_local_expert_count)
        return (out, self._out_weights, out_scales, self._out_indices, self._total_recv)

    def dispatch_send(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        warp_per_block: int = -1,
        call_local_expert_count: bool = False,
    ) -> tuple[torch.Tensor | None, ...]:
        return self.dispatch(input, weights, scales, indices, block_num=block_num, warp_per_block=warp_per_block)

    @kernel
    def dispatch_recv(
        self, block_num: int = -1, warp_per_block: int = -1, call_local_expert_count: bool = False
    ) -> None:
        assert self._layout is not None, "dispatch_recv requires a prior dispatch/dispatch_send call"
        self._require_two_phase("dispatch_recv")
        if self._state != "sent":
            raise VendorWouldCorrupt(f"dispatch_recv without an outstanding dispatch_send (state: {self._state})")
        self._deliver(call_local_expert_count)

    @kernel
    def get_dispatch_src_token_pos(self) -> torch.Tensor:
        """int32 [total_recv]: source rank times stride plus the token's index there, of each received row."""
        if self._state != "received" or self._layout is None:
            raise VendorWouldCorrupt(f"get_dispatch_src_token_pos outside dispatch ... combine (state: {self._state})")
        is_legacy = self.config.kernel_type is EpDispatchCombineKernelType.InterNode
        stride = self.config.max_num_inp_token_per_rank if is_legacy else self.max_num_tokens_to_send()
        sources = torch.repeat_interleave(
            torch.arange(self.config.world_size), torch.tensor(self._layout.recv_counts, dtype=torch.int64)
        )[self._layout.order]
        tokens = self._layout.records[:, -4:].contiguous().view(torch.int32).squeeze(1)
        return (sources * stride + tokens).to(torch.int32)

    # And back

    @kernel
    def combine(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
        use_external_inp_buf: int = -1,
        call_reset: bool = False,
        *,
        routing: object | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if routing is not None:
            raise NotImplementedError("the fake has no routing handles")
        external = self.config.use_external_inp_buf if use_external_inp_buf < 0 else bool(use_external_inp_buf)
        agree(self._group, (), self._combine_complaint(input, weights, indices, external))
        layout = self._layout
        assert layout is not None
        total, width = layout.total, input.shape[1]
        by_source = external and self.config.kernel_type in _SINGLE_NODE
        sent = through_the_wire(input[:total], self.config.quant_type, _codec_groups())
        sums = self._send_back(sent, by_source)
        weight_sums = None if weights is None else self._send_back(weights[:total])
        out = self._view("combine_out", input.dtype, self.config.max_num_inp_token_per_rank, width)
        poison(out)
        poison(self._combine_weights)
        self._pending = (out, sums, weight_sums)
        if self.config.kernel_type is _TWO_PHASE:
            self._state = "combine sent"
        else:
            self._finish()
            self._total_recv.zero_()
        return out, None if weights is None else self._combine_weights

    def combine_send(
        self,
        input: torch.Tensor,
        weights: torch.Tensor | None,
        indices: torch.Tensor,
        block_num: int = -1,
        warp_per_block: int = -1,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.combine(input, weights, indices, block_num=block_num, warp_per_block=warp_per_block)

    @kernel
    def combine_recv(self, block_num: int = -1, warp_per_block: int = -1) -> None:
        assert self._pending is not None, "combine_recv requires a prior combine/combine_send call"
        self._require_two_phase("combine_recv")
        if self._state != "combine sent":
            raise VendorWouldCorrupt(f"combine_recv without an outstanding combine_send (state: {self._state})")
        self._finish()

    # Inside

    def _view(self, name: str, dtype: torch.dtype, rows: int, width: int) -> torch.Tensor:
        """The same tensor object for the same request, over storage that lives as long as the op."""
        key = (name, dtype, rows, width)
        if key not in self._views:
            size = rows * width * torch.empty(0, dtype=dtype).element_size()
            self._views[key] = self._storage[name][:size].view(dtype).view(rows, width)
        return self._views[key]

    def _destinations(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """For each rank the mask [T] of tokens that have an expert there; ids outside [0, E) go nowhere."""
        per_rank, world = self.config.num_experts_per_rank, self.config.world_size
        valid = (indices >= 0) & (indices < per_rank * world)
        owner = torch.where(valid, indices // per_rank, world)
        return [(owner == rank).any(dim=1) for rank in range(world)]

    def _row_order(self, recv_counts: list[int]) -> torch.Tensor:
        """A permutation as arbitrary as the vendor's, and the same in every run."""
        generator = torch.Generator().manual_seed(1000 * self._calls + self.config.rank)
        if self.config.kernel_type is not _TWO_PHASE:
            return torch.randperm(sum(recv_counts), generator=generator)
        starts = [sum(recv_counts[:rank]) for rank in range(len(recv_counts))]
        return torch.cat([start + torch.randperm(n, generator=generator) for start, n in zip(starts, recv_counts)])

    def _refuse_overflow(self, matrix: list[list[int]]) -> None:
        room = self.max_num_tokens_to_recv()
        for rank in range(self.config.world_size):
            needed = sum(row[rank] for row in matrix)
            if needed > room:
                raise VendorWouldCorrupt(
                    f"rank {rank} would receive {needed} rows, its buffer has {room} (max_total_recv_tokens="
                    f"{getattr(self.config, 'max_total_recv_tokens', 0)}): the vendor writes past its end"
                )

    def _deliver(self, count_experts: bool) -> None:
        assert self._layout is not None
        layout, total, start = self._layout, self._layout.total, 0
        out, weights, scales, ids = self._outputs
        for view in (out, ids, weights, scales):
            if view is not None:
                target = as_bytes(view)[:total]
                target.copy_(layout.records[:, start : start + target.shape[1]])
                start += target.shape[1]
        self._total_recv.fill_(total)
        self._state = "received"
        if count_experts:
            local = self._out_indices[:total].flatten() - self.config.rank * self.config.num_experts_per_rank
            mine = local[(local >= 0) & (local < self.config.num_experts_per_rank)]
            counts = torch.bincount(mine, minlength=self.config.num_experts_per_rank)
            self.local_expert_count.copy_(counts)

    def _send_back(self, rows: torch.Tensor, by_source: bool = False) -> torch.Tensor:
        """Sum [T, width] over destination ranks in ascending order, in float32, of rows [total, width].

        by_source: through the rows of the combine input that the destination ranks write at their sources.
        """
        layout = self._layout
        assert layout is not None
        arrived = torch.empty_like(rows)
        arrived[layout.order] = rows
        parts = [as_bytes(part.contiguous()) for part in arrived.split(layout.recv_counts)]
        counts = [len(tokens) for tokens in layout.sent_tokens]
        returned = exchange_rows(self._group, parts, counts)
        sums = torch.zeros(layout.indices.shape[0], rows.shape[1], dtype=torch.float32)
        width, limit = rows.shape[1], self.config.max_num_inp_token_per_rank
        values = [part.reshape(-1).view(rows.dtype).view(-1, width) for part in returned]
        if by_source:
            staging = self._view("combine_in", rows.dtype, self.max_num_tokens_to_recv(), width)
            for rank, (tokens, part) in enumerate(zip(layout.sent_tokens, values)):
                staging[rank * limit + tokens] = part
            values = [staging[rank * limit + tokens] for rank, tokens in enumerate(layout.sent_tokens)]
        for tokens, part in zip(layout.sent_tokens, values):
            sums.index_add_(0, tokens, part.float())
        return sums

    def _finish(self) -> None:
        assert self._pending is not None
        out, sums, weight_sums = self._pending
        out[: len(sums)] = sums.to(out.dtype)
        if weight_sums is not None:
            self._combine_weights[: len(weight_sums)] = weight_sums
        self._state = "idle"

    def _require_two_phase(self, name: str) -> None:
        if self.config.kernel_type is not _TWO_PHASE:
            raise ValueError(f"{name} only supports AsyncLL, got kernel_type={self.config.kernel_type.value}")

    def _dispatch_complaint(
        self,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
    ) -> Exception | None:
        config, kernel = self.config, self.config.kernel_type
        rows, experts = x.shape[0], config.world_size * config.num_experts_per_rank
        given = [t for t in (x, weights, scales, indices) if t is not None]
        per_rank = config.num_experts_per_rank
        if self._state != "idle":
            text = f"dispatch while the previous one is not combined (state: {self._state}): rows are counted twice"
        elif rows > config.max_num_inp_token_per_rank:
            text = f"{rows} tokens, max_num_inp_token_per_rank is {config.max_num_inp_token_per_rank}"
        elif x.dtype not in _DISPATCH_DTYPES:
            text = f"dispatch has no kernel for {x.dtype}"
        elif x.shape[1] * x.element_size() > config.hidden_dim * config.max_token_type_size:
            text = f"rows of {x.shape[1]} x {x.dtype} exceed hidden_dim * max_token_type_size bytes"
        elif indices.dtype != torch.int32 or indices.shape != (rows, config.num_experts_per_token):
            text = f"indices must be int32 [{rows}, {config.num_experts_per_token}], got {_shown(indices)}"
        elif weights is None and kernel is not EpDispatchCombineKernelType.IntraNode:
            text = f"{kernel.name} reads the weights; None is a null pointer"
        elif weights is not None and (weights.dtype != torch.float32 or weights.shape != indices.shape):
            text = f"weights must be float32 {tuple(indices.shape)}, got {_shown(weights)}"
        elif scales is not None and config.scale_dim and scales.shape != (rows, config.scale_dim):
            text = f"scales must be [{rows}, {config.scale_dim}], got {_shown(scales)}"
        elif scales is not None and config.scale_dim and scales.element_size() != config.scale_type_size:
            text = f"scales of {scales.dtype}, scale_type_size is {config.scale_type_size}"
        elif not all(t.is_contiguous() for t in given):
            text = "the kernels read by pointer; every tensor must be contiguous"
        elif kernel in _KEEPS_NEGATIVE_IDS and bool(((indices < 0) & (indices > -per_rank)).any()):
            text = f"a negative id under {kernel.name} (with {experts} experts) is delivered to rank 0, not dropped"
        else:
            return None
        return VendorWouldCorrupt(f"dispatch: {text}")

    def _combine_complaint(
        self, x: torch.Tensor, weights: torch.Tensor | None, indices: torch.Tensor, external: bool
    ) -> Exception | None:
        config, layout, blockwise = self.config, self._layout, self.config.quant_type == "fp8_blockwise"
        if self._state != "received" or layout is None:
            return VendorWouldCorrupt(f"combine without a received dispatch (state: {self._state})")
        dispatched = layout.indices.shape[0]
        if indices.shape[0] != dispatched:
            return ValueError(
                f"combine() indices has {indices.shape[0]} rows but this rank dispatched {dispatched} tokens"
            )
        if blockwise and (x.dtype != torch.bfloat16 or config.kernel_type not in _BLOCKWISE_KERNELS or not external):
            return ValueError("fp8_blockwise combine takes bf16 from an external buffer, IntraNode or AsyncLL")
        room, last = self.max_num_tokens_to_recv(), -1
        if external and config.kernel_type in _SINGLE_NODE and dispatched:
            last = int(last_combine_rows(layout.goes, config.max_num_inp_token_per_rank))
        registered = self._storage["combine_in"].data_ptr()
        if not torch.equal(indices, layout.indices):
            text = "indices are not the ids that this rank dispatched"
        elif x.dtype not in _COMBINE_DTYPES:
            text = f"no kernel for {x.dtype}"
        elif x.shape[0] < layout.total or x.shape[1] > config.hidden_dim:
            text = f"{layout.total} rows are read, the input is {_shown(x)}"
        elif last >= room:
            text = (
                f"row {last} (rank * max_num_inp_token_per_rank + token) of {room} is written here: the vendor writes "
                "past the end of its combine input"
            )
        elif weights is not None and (weights.dtype != torch.float32 or weights.shape[0] < layout.total):
            text = f"weights must be float32 of at least {layout.total} rows, got {_shown(weights)}"
        elif not x.is_contiguous():
            text = "the kernels read by pointer; the input must be contiguous"
        elif not external and x.data_ptr() != registered:
            text = "without an external buffer the input must be get_registered_combine_input_buffer's"
        elif blockwise and x.shape[1] % _codec_groups():
            text = f"MORI_FP8_COMBINE_SCALE_DIM={_codec_groups()} does not divide hidden size {x.shape[1]}"
        else:
            return None
        return VendorWouldCorrupt(f"combine: {text}")


def _codec_groups() -> int:
    return int(os.environ.get("MORI_FP8_COMBINE_SCALE_DIM", "56"))


def _shown(x: torch.Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)}"

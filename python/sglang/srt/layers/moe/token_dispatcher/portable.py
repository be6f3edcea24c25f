"""The exchange of tokens between expert ranks over torch's collectives, on any device.

Rows travel as records of bytes (some types have no collective of their own). There are two ways:

- *routed*: each rank tells how many rows go where, then each row goes to the ranks of its experts. The host must know
  the counts, so this is the way of CPUs, and of GPUs when the caller does not know them.
- *gathered*: each row goes to every rank, and each picks its own on the device. Sizes follow from the rows that each
  rank brings, which all ranks know, so nothing is read back and the exchange can be captured in a graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang.srt.distributed.parallel_state import Pending, ProcessGroupHandle
from sglang.srt.layers.moe.token_dispatcher.base import DispatchError, EpConfig, RecvBatch, SendBatch

# Columns of a record start at multiples of this many bytes, so that they can be viewed in their own types.
ALIGNMENT = 16
WIRE_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class RecordLayout:
    """Where the fields of a row stand in its record: row, weights, ids, and scales if any."""

    def __init__(self, config: EpConfig) -> None:
        k = config.num_experts_per_token
        fields = [(config.hidden_dim, config.data_type), (k, torch.float32), (k, torch.int32)]
        if config.scale_dim:
            fields.append((config.scale_dim, torch.float32))
        self._columns: list[tuple[int, int, torch.dtype]] = []
        self.num_bytes = 0
        for count, dtype in fields:
            size = count * dtype.itemsize
            # Moved as integers: eight-bit floats have few operations.
            self._columns.append((self.num_bytes, self.num_bytes + size, WIRE_TYPES[dtype.itemsize]))
            self.num_bytes += -(-size // ALIGNMENT) * ALIGNMENT

    def views(self, records: torch.Tensor) -> list[torch.Tensor]:
        """The fields of records [n, num_bytes], as integers of their size."""
        return [records[:, first:end].view(dtype) for first, end, dtype in self._columns]

    def write(self, records: torch.Tensor, fields: Sequence[torch.Tensor]) -> None:
        """Fill the first rows of ``records``; the rest becomes rows without experts."""
        views = self.views(records)
        rows = fields[0].shape[0]
        for view, values in zip(views, fields, strict=True):
            view[:rows].copy_(values.contiguous().view(view.dtype))
        views[2][rows:].fill_(-1)


class RoutedExchange:
    """Rows go to the ranks of their experts; a rank receives them by source, in the source's order."""

    def __init__(
        self, config: EpConfig, group: ProcessGroupHandle, layout: RecordLayout, fields: Sequence[torch.Tensor]
    ) -> None:
        self._group, self._layout = group, layout
        ids = fields[2]
        inside = (ids >= 0) & (ids < config.num_experts)
        owners = torch.where(inside, ids // config.num_experts_per_rank, config.world_size)
        ranks = torch.arange(config.world_size, dtype=owners.dtype, device=ids.device)
        goes = (owners.unsqueeze(-1) == ranks).any(1)
        counts = group.all_gather_ints(goes.sum(0).tolist())
        self._sent, self._received = counts[config.rank], [row[config.rank] for row in counts]
        needed = [sum(column) for column in zip(*counts)]
        self.num_rows = needed[config.rank]
        if max(needed) > config.max_recv:
            raise DispatchError(
                f"rank {needed.index(max(needed))} would receive {max(needed)} rows into a buffer of {config.max_recv} "
                f"(max_total_recv_tokens={config.max_total_recv_tokens}): raise SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS"
            )
        # Rows in the order of sending: by destination, ascending within one.
        self._sent_rows = goes.t().nonzero()[:, 1]
        records = torch.empty(ids.shape[0], layout.num_bytes, dtype=torch.uint8, device=ids.device)
        layout.write(records, fields)
        self._pending = group.exchange_rows(records[self._sent_rows], self._sent, self._received)

    def receive(self, buffers: Sequence[torch.Tensor], total_recv: torch.Tensor) -> None:
        for buffer, values in zip(buffers, self._layout.views(self._pending.wait()), strict=True):
            buffer[: self.num_rows].copy_(values)
        total_recv.fill_(self.num_rows)

    def send_back(self, y: torch.Tensor) -> Pending:
        if y.shape[0] < self.num_rows:
            raise DispatchError(f"{y.shape[0]} rows to combine, but {self.num_rows} arrived")
        return self._group.exchange_rows(y[: self.num_rows], self._received, self._sent)

    def sum_into(self, out: torch.Tensor, pending: Pending) -> None:
        total = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
        parts = pending.wait().split(self._sent)
        for rows, values in zip(self._sent_rows.split(self._sent), parts, strict=True):
            total.index_add_(0, rows, values.float())
        out.copy_(total)


class GatheredExchange:
    """Rows go to all ranks; each keeps, by prefix sums on the device, those with an expert of its own."""

    def __init__(
        self,
        config: EpConfig,
        group: ProcessGroupHandle,
        layout: RecordLayout,
        fields: Sequence[torch.Tensor],
        rows_of_ranks: Sequence[int],
    ) -> None:
        if sum(rows_of_ranks) > config.max_recv or rows_of_ranks[config.rank] != fields[0].shape[0]:
            raise DispatchError(
                f"ranks bring {list(rows_of_ranks)} rows, rank {config.rank} {fields[0].shape[0]} of them, to buffers "
                f"of {config.max_recv}: cut the step into rounds or raise SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS"
            )
        self._config, self._group, self._layout = config, group, layout
        self._share, self._most = max(rows_of_ranks), sum(rows_of_ranks)
        records = torch.empty(self._share, layout.num_bytes, dtype=torch.uint8, device=fields[0].device)
        layout.write(records, fields)
        self._pending = group.gather_rows(records)
        self.num_rows = min(config.world_size * self._share, config.max_recv)

    def receive(self, buffers: Sequence[torch.Tensor], total_recv: torch.Tensor) -> None:
        views = self._layout.views(self._pending.wait())
        count = views[2].shape[0]
        if not count:
            total_recv.zero_()
            return
        first = self._config.rank * self._config.num_experts_per_rank
        self._mine = ((views[2] >= first) & (views[2] < first + self._config.num_experts_per_rank)).any(1)
        places = self._mine.cumsum(0)
        total_recv.copy_(places[-1:])
        self._place = places - 1
        # Row of each buffer slot; rows of others all land in one slot past the end.
        order = torch.zeros(count + 1, dtype=torch.int64, device=views[2].device)
        order.scatter_(0, self._place.masked_fill(~self._mine, count), torch.arange(count, device=order.device))
        for buffer, values in zip(buffers, views, strict=True):
            torch.index_select(values, 0, order[: self.num_rows], out=buffer[: self.num_rows])

    def send_back(self, y: torch.Tensor) -> Pending:
        if not self.num_rows:
            return Pending(y)
        if y.shape[0] < self._most:
            raise DispatchError(f"{y.shape[0]} rows to combine, but {self._most} may have arrived")
        # Chosen, not multiplied: what a rank computed on stale rows may be anything.
        rows = y.index_select(0, self._place.clamp(min=0)).masked_fill_(~self._mine.unsqueeze(1), 0)
        even = [self._share] * self._config.world_size
        return self._group.exchange_rows(rows, even, even)

    def sum_into(self, out: torch.Tensor, pending: Pending) -> None:
        values = pending.wait()
        if not out.shape[0]:
            return
        parts = values.view(self._config.world_size, self._share, -1)[:, : out.shape[0]]
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part
        out.copy_(total)


class PortableTransport:
    """``EpTransport`` over a group's collectives; ``gathered`` exchanges wherever the caller knows all row counts."""

    def __init__(self, config: EpConfig, group: ProcessGroupHandle, device: torch.device | str, gathered: bool) -> None:
        if (config.rank, config.world_size) != (group.rank, group.size):
            raise ValueError(f"rank {config.rank} of {config.world_size} is not in {group}")
        self.config = config
        self._group, self._gathered = group, gathered
        self._layout = RecordLayout(config)
        rows, k = config.max_recv, config.num_experts_per_token
        self._batch = RecvBatch(
            torch.empty(rows, config.hidden_dim, dtype=config.data_type, device=device),
            torch.empty(rows, k, dtype=torch.float32, device=device),
            torch.empty(rows, config.scale_dim, dtype=torch.float32, device=device) if config.scale_dim else None,
            torch.empty(rows, k, dtype=torch.int32, device=device),
            torch.zeros(1, dtype=torch.int32, device=device),
        )
        fields = [self._batch.hidden, self._batch.weights, self._batch.indices]
        fields += [] if self._batch.scales is None else [self._batch.scales]
        self._buffers = [field.view(WIRE_TYPES[field.element_size()]) for field in fields]
        self._out = torch.empty(
            config.max_num_inp_token_per_rank, config.hidden_dim, dtype=config.combine_type, device=device
        )
        self._exchange: RoutedExchange | GatheredExchange | None = None
        self._back: Pending | None = None
        self._num_sent = 0
        self._is_sent = False

    def describe(self) -> str:
        way = "gathered" if self._gathered else "routed"
        return f"portable ({way} over torch.distributed, {'two_phase' if self.config.two_phase else 'sync'})"

    def dispatch_send(self, sent: SendBatch) -> RecvBatch:
        if self._is_sent or self._back is not None:
            raise DispatchError("a dispatch or combine was sent and not received: receive it before the next send")
        self.config.check_input(sent)
        x, weights, scales, indices, rows_of_ranks = sent
        fields = [x, weights, indices] + ([] if scales is None else [scales])
        if self._gathered and rows_of_ranks is not None:
            self._exchange = GatheredExchange(self.config, self._group, self._layout, fields, rows_of_ranks)
        else:
            self._exchange = RoutedExchange(self.config, self._group, self._layout, fields)
        self._num_sent, self._is_sent = x.shape[0], True
        return self._batch

    def dispatch_recv(self) -> None:
        assert self._exchange is not None and self._is_sent, "nothing was dispatched: dispatch_send comes first"
        self._exchange.receive(self._buffers, self._batch.total_recv)
        self._is_sent = False

    def combine_send(self, y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        assert self._exchange is not None and not self._is_sent and self._back is None, "nothing to combine"
        if indices.shape[0] != self._num_sent:
            raise ValueError(f"combine by {indices.shape[0]} rows of ids, but {self._num_sent} rows were dispatched")
        if y.dtype != self.config.combine_type:
            raise ValueError(f"expected {self.config.combine_type} results, got {y.dtype}")
        self._back = self._exchange.send_back(y)
        return self._out

    def combine_recv(self) -> None:
        assert self._exchange is not None and self._back is not None, "nothing was combined: combine_send comes first"
        self._exchange.sum_into(self._out[: self._num_sent], self._back)
        self._exchange = self._back = None
        if not self.config.two_phase:
            self._batch.total_recv.zero_()

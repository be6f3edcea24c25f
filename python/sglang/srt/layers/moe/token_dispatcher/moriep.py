"""The MORI protocol of expert parallelism: MORI itself on HIP, the portable transport elsewhere.

``MoriEPDispatcher`` is what layers use. Each direction is two calls, a and b: with MORI's AsyncLL kernel the first only
starts copies, and the caller's work before the second call overlaps them.
"""

from __future__ import annotations

import inspect
import logging
import zlib
from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from sglang.kernels.ops.quant.group_fp8 import fp8_dtype, quantize_groups
from sglang.srt.arg_groups.stream_policy import exchange_warnings
from sglang.srt.distributed.parallel_state import ProcessGroupHandle
from sglang.srt.layers.moe.token_dispatcher.base import (
    DispatchError,
    EpConfig,
    EpTransport,
    ExchangeConfigError,
    RecvBatch,
    SendBatch,
)
from sglang.srt.layers.moe.token_dispatcher.config import NODE, MoriConfig
from sglang.srt.layers.moe.token_dispatcher.mori_plan import WAVE, MoriKernel, choose_kernel, plan_exchange
from sglang.srt.layers.moe.token_dispatcher.portable import PortableTransport
from sglang.srt.layers.moe.token_dispatcher.recv_stats import RecvStats
from sglang.srt.layers.moe.topk import TopKOutput
from sglang.srt.platforms import current_platform

logger = logging.getLogger(__name__)

GROUP_NAME = "mori"
# Fields of MORI's configuration that a release may lack, and the value at which their absence changes nothing.
# "any": a matter of speed alone.
DROPPABLE: dict[str, Any] = {
    "num_qp_per_pe": "any",
    "rdma_block_num": 0,
    "use_external_inp_buf": True,
    "max_total_recv_tokens": 0,
    "quant_type": "none",
}


def check_mori_compatibility(kwargs: dict[str, Any], config_class: type | None = None) -> None:
    """Take out of ``kwargs`` what ``config_class`` (default: the installed MORI's) lacks, where that changes nothing.

    What is taken out is named in the log. Raises ExchangeConfigError that names every field whose absence would change
    memory, results or the kernel; ``kwargs`` then stay as they are.
    """
    config_class = _import_mori().ops.EpDispatchCombineConfig if config_class is None else config_class
    known = inspect.signature(config_class).parameters
    missing = {name: value for name, value in kwargs.items() if name not in known}
    refused = [name for name, value in missing.items() if DROPPABLE.get(name, missing) not in ("any", value)]
    if refused:
        asked = ", ".join(f"{name}={missing[name]!r}" for name in refused)
        raise ExchangeConfigError(
            f"this MORI's {config_class.__module__}.{config_class.__name__} lacks {asked}: without them it would not "
            "run as configured. Install MORI 1.1.0 or later (its first op, not dispatch_combine_v2), or unset the "
            "settings that need them (max_total_recv_tokens: SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS)"
        )
    if missing:
        logger.warning(
            "this MORI release does not support %s, which changes no result: ignored", ", ".join(sorted(missing))
        )
    for name in missing:
        del kwargs[name]


def _import_mori() -> Any:
    try:
        import mori.ops
        import mori.shmem
    except Exception as error:  # a missing ROCm library is an OSError, a half-built MORI anything
        raise ExchangeConfigError(
            f"--moe-a2a-backend mori needs the package amd-mori on HIP, and it cannot be imported here: {error!r}"
        ) from error
    return mori


@lru_cache(maxsize=1)
def _join_shmem(group: ProcessGroupHandle) -> None:
    """Give MORI's symmetric memory the ranks of ``group``, which must run one release; once per process."""
    mori = _import_mori()
    version = str(getattr(mori, "__version__", "unknown"))
    versions = group.all_gather_ints([zlib.crc32(version.encode())])
    if any(theirs != versions[0] for theirs in versions):
        odd = [rank for rank, theirs in enumerate(versions) if theirs != versions[0]]
        raise ExchangeConfigError(
            f"ranks {odd} run another MORI release than rank 0 (this rank: {version}): install the same release"
        )
    torch._C._distributed_c10d._register_process_group(GROUP_NAME, group.cpu_group)
    mori.shmem.shmem_torch_process_group_init(GROUP_NAME)


def op_arguments(config: EpConfig, kernel: MoriKernel) -> dict[str, Any]:
    """What the installed MORI's configuration is given for ``config``; raises ExchangeConfigError if it is too old."""
    kernel_types = _import_mori().ops.EpDispatchCombineKernelType
    if not hasattr(kernel_types, kernel.name):
        raise ExchangeConfigError(f"this MORI has no kernel {kernel.name}: install MORI 1.1.0 or later")
    arguments = {
        "data_type": config.data_type,
        "rank": config.rank,
        "world_size": config.world_size,
        "hidden_dim": config.hidden_dim,
        "scale_dim": config.scale_dim,
        "scale_type_size": torch.float32.itemsize,
        "max_token_type_size": max(config.data_type.itemsize, config.combine_type.itemsize),
        "max_num_inp_token_per_rank": config.max_num_inp_token_per_rank,
        "num_experts_per_rank": config.num_experts_per_rank,
        "num_experts_per_token": config.num_experts_per_token,
        "warp_num_per_block": kernel.warp_num_per_block,
        "block_num": kernel.block_num,
        "max_total_recv_tokens": config.max_total_recv_tokens,
        "use_external_inp_buf": True,
        "kernel_type": getattr(kernel_types, kernel.name),
        "gpu_per_node": min(config.world_size, NODE),
        "rdma_block_num": kernel.rdma_block_num,
        "num_qp_per_pe": 2,
        "quant_type": config.combine_wire,
    }
    check_mori_compatibility(arguments)
    return arguments


def release_problem(config: EpConfig, kernel: MoriKernel) -> str:
    """Why the MORI that is installed here cannot serve ``config``; "" if it can, or if none can be imported here."""
    try:
        _import_mori()
    except ExchangeConfigError:
        return ""  # a plan for another machine; a rank without MORI refuses to start
    try:
        op_arguments(config, kernel)
    except ExchangeConfigError as error:
        return str(error)
    return ""


def make_mori_op(config: EpConfig, kernel: MoriKernel, group: ProcessGroupHandle) -> Any:
    """MORI's dispatch and combine op for ``config``; all ranks of ``group`` call it."""
    mori = _import_mori()
    _join_shmem(group)
    op = mori.ops.EpDispatchCombineOp(mori.ops.EpDispatchCombineConfig(**op_arguments(config, kernel)))
    if op.max_num_tokens_to_recv() != config.max_recv:
        raise ExchangeConfigError(
            f"MORI allocated {op.max_num_tokens_to_recv()} received rows where {config.max_recv} are planned "
            f"(max_total_recv_tokens={config.max_total_recv_tokens}): this release rounds differently"
        )
    return op


@lru_cache(maxsize=4)
def init_mori_op(
    group: ProcessGroupHandle,
    router_topk: int,
    num_experts: int,
    num_local_experts: int,
    hidden_size: int,
    params_dtype: torch.dtype,
    num_max_dispatch_tokens_per_rank: int,
    deepep_mode: str | Enum = "normal",
    instance_id: int = 0,
    dispatch_dtype: str | Enum = "bf16",
    combine_dtype: str | Enum = "bf16",
    enable_sdma: bool = False,
) -> Any:
    """MORI's op by the arguments of sglang's function of this name, one for each set of them; collective.

    ``instance_id`` tells apart ops of equal sizes. SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS caps the buffers: see
    ``plan_exchange`` for what that makes of the limit. Raises ExchangeConfigError.
    """
    if num_local_experts * group.size != num_experts:
        raise ExchangeConfigError(f"{num_experts} experts are not {group.size} x {num_local_experts}")
    mode, sent, back = (_spelled(each) for each in (deepep_mode, dispatch_dtype, combine_dtype))
    config = MoriConfig.from_env(
        group.size,
        low_latency=mode == "low_latency",
        max_dispatch_tokens=num_max_dispatch_tokens_per_rank,
        dispatch_dtype=sent,
        combine_dtype=back,
        copy_engines=enable_sdma,
    )
    kernel = choose_kernel(config)
    row_dtype = fp8_dtype(current_platform.arch) if sent == "fp8" else None
    sizes = (num_experts, hidden_size, router_topk, params_dtype, row_dtype)
    return make_mori_op(plan_exchange(config, kernel, group.rank, *sizes), kernel, group)


def _spelled(choice: str | Enum) -> str:
    """A choice as the variables spell it; sglang's callers give members of enumerations."""
    return choice.name.lower() if isinstance(choice, Enum) else choice


class MoriTransport:
    """``EpTransport`` over MORI's op; every dispatch of a two-phase op is paired with its recv."""

    def __init__(self, config: EpConfig, kernel: MoriKernel, group: ProcessGroupHandle) -> None:
        if config.num_experts_per_token >= WAVE:
            raise ExchangeConfigError(f"MORI takes fewer than {WAVE} experts per token: {config.num_experts_per_token}")
        self.config, self._kernel = config, kernel
        self._op = make_mori_op(config, kernel, group)
        # What a send reads must live until its recv.
        self._held: tuple[object, ...] = ()
        self._most = config.max_recv
        rows, k = config.max_recv, config.num_experts_per_token
        scales = ((rows, config.scale_dim), torch.float32) if config.scale_dim else None
        hidden, weights = ((rows, config.hidden_dim), config.data_type), ((rows, k), torch.float32)
        self._planned = (hidden, weights, scales, ((rows, k), torch.int32), ((1,), torch.int32))
        self._planned_sums = ((config.max_num_inp_token_per_rank, config.hidden_dim), config.combine_type)

    def describe(self) -> str:
        mori = _import_mori()
        fake = " FAKE" if "mori" in current_platform.fakes else ""
        return f"MORI {getattr(mori, '__version__', 'of unknown version')}{fake} ({self._kernel.name})"

    def dispatch_send(self, sent: SendBatch) -> RecvBatch:
        self.config.check_input(sent)
        x, weights, scales, indices, rows_of_ranks = sent
        # MORI counts on the device and does not ask whether the rows fit, so the most that can arrive is checked here.
        worst = self.config.world_size * self.config.max_num_inp_token_per_rank
        most = worst if rows_of_ranks is None else sum(rows_of_ranks)
        if most > self.config.max_recv:
            brought = f"{list(rows_of_ranks)} rows" if rows_of_ranks is not None else f"up to {worst} rows, none said,"
            raise DispatchError(f"ranks bring {brought} to buffers of {self.config.max_recv}")
        self._most = most
        self._held = (x.contiguous(), weights.contiguous(), scales, indices.contiguous())
        batch = RecvBatch(*self._op.dispatch(*self._held))
        _check_delivery(tuple(_form(each) for each in batch), self._planned)
        return batch

    def dispatch_recv(self) -> None:
        if self._kernel.is_two_phase:
            self._op.dispatch_recv()

    def combine_send(self, y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        # MORI reads as many rows as arrived and does not ask whether the experts made them.
        if y.dtype != self.config.combine_type or y.shape[0] < self._most or y.shape[1] != self.config.hidden_dim:
            raise DispatchError(f"{y.dtype} {list(y.shape)} to combine, but {self._most} rows may have arrived")
        self._held = (y.contiguous(), None, indices.contiguous())
        sums: torch.Tensor = self._op.combine(*self._held)[0]
        _check_delivery(_form(sums), self._planned_sums)
        return sums

    def combine_recv(self) -> None:
        if self._kernel.is_two_phase:
            self._op.combine_recv()


def _form(tensor: torch.Tensor | None) -> object:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype)


def _check_delivery(found: object, planned: object) -> None:
    """Hold rows and types that MORI delivered to those that were planned."""
    if found != planned:
        raise DispatchError(f"MORI delivered {found} where {planned} is planned: it differs from releases 1.1 to 1.2")


class MoriEPNormalDispatchOutput(NamedTuple):
    """What arrived, and what was sent for it: the names of sglang's record, for both modes.

    hidden_states [R, H], hidden_states_scale [R, S] or None, topk_ids [R, K] global, topk_weights [R, K] are views that
    the next dispatch overwrites; the first num_recv_tokens_per_expert [1] int32 rows are valid (a total, whatever its
    name says). recv_cap: rows that are proven to hold them, 0 for all.
    """

    hidden_states: torch.Tensor
    hidden_states_scale: torch.Tensor | None
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor
    num_recv_tokens_per_expert: torch.Tensor
    origin_topk_ids: torch.Tensor
    origin_topk_weights: torch.Tensor
    out_dtype: torch.dtype
    recv_cap: int = 0


class MoriEPNormalCombineInput(NamedTuple):
    """Results [>= received rows, H] of the experts, with the ids and weights that were dispatched."""

    hidden_states: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


class MoriEPDispatcher:
    """Sends a rank's rows to the ranks of their experts and brings the sums back, a step of four calls in this order:
    ``dispatch_a``, ``dispatch_b``, ``combine_a``, ``combine_b``. All ranks make the same calls, also without rows.
    """

    STAGES = ("dispatch_a", "dispatch_b", "combine_a", "combine_b")

    def __init__(self, transport: EpTransport, device: torch.device) -> None:
        self.transport = transport
        self.config = transport.config
        self.recv_stats = RecvStats(self.config.max_recv, device)
        self._next = 0
        self._topk: TopKOutput | None = None
        self._batch: RecvBatch | None = None
        self._out: torch.Tensor | None = None
        for warning in exchange_warnings(current_platform, self.mode) if self.config.rank == 0 else ():
            logger.warning("%s", warning)

    @property
    def mode(self) -> str:
        """The mode in which the exchange runs, as --deepep-mode spells it; MORI_ENABLE_SDMA alone makes it low."""
        return "low_latency" if self.config.two_phase else "normal"

    def _enter(self, stage: str) -> None:
        if self.STAGES[self._next] != stage:
            raise DispatchError(f"{stage} was called where {self.STAGES[self._next]} comes next")
        self._next = (self._next + 1) % len(self.STAGES)

    def dispatch(
        self, hidden_states: torch.Tensor, topk_output: TopKOutput, rows_of_ranks: Sequence[int] | None = None
    ) -> MoriEPNormalDispatchOutput:
        """``dispatch_a`` and ``dispatch_b``."""
        self.dispatch_a(hidden_states, topk_output, rows_of_ranks)
        return self.dispatch_b()

    def combine(self, combine_input: MoriEPNormalCombineInput) -> torch.Tensor:
        """``combine_a`` and ``combine_b``."""
        self.combine_a(combine_input)
        return self.combine_b()

    def dispatch_a(
        self, hidden_states: torch.Tensor, topk_output: TopKOutput, rows_of_ranks: Sequence[int] | None = None
    ) -> None:
        """Start to send rows hidden_states [T, H] with weights [T, K] float32 and global ids [T, K] int32.

        They travel in the configured type: 8-bit ones are quantised here, by groups of 128 columns. ``rows_of_ranks``:
        the rows that each rank brings, where all know it; buffers under a receive cap take no others.
        """
        self._enter("dispatch_a")
        rows, scales = hidden_states, None
        if self.config.scale_dim:
            rows, scales = quantize_groups(hidden_states, self.config.data_type)
        self._topk = topk_output
        sent = SendBatch(rows, topk_output.weights, scales, topk_output.ids, rows_of_ranks)
        self._batch = self.transport.dispatch_send(sent)

    def dispatch_b(self, recv_cap: int = 0) -> MoriEPNormalDispatchOutput:
        """What arrived, at most ``recv_cap`` rows of it (0: unknown); valid until the next ``dispatch_a``."""
        self._enter("dispatch_b")
        self.transport.dispatch_recv()
        assert self._batch is not None and self._topk is not None
        hidden, weights, scales, ids, total = self._batch
        sent = (self._topk.ids, self._topk.weights, self.config.combine_type)
        return MoriEPNormalDispatchOutput(hidden, scales, ids, weights, total, *sent, recv_cap)

    def combine_a(self, combine_input: MoriEPNormalCombineInput) -> None:
        """Start to send back what the experts made of the received rows; raises DispatchError for other rows' ids."""
        self._enter("combine_a")
        assert self._topk is not None
        if combine_input.topk_ids is not self._topk.ids:
            raise DispatchError("combine takes the ids that this rank dispatched (origin_topk_ids), not received ones")
        self._out = self.transport.combine_send(combine_input.hidden_states, combine_input.topk_ids)

    def combine_b(self) -> torch.Tensor:
        """The sums [T, H] of this rank's rows; a view that the next combine overwrites."""
        self._enter("combine_b")
        self.transport.combine_recv()
        assert self._out is not None and self._topk is not None
        return self._out[: self._topk.ids.shape[0]]

    def describe(self) -> dict[str, Any]:
        """What carries the tokens and how much it may carry, for the log and /server_info."""
        config = self.config
        return {
            "protocol": "mori",
            "transport": self.transport.describe(),
            "mode": self.mode,
            "world_size": config.world_size,
            "dispatch_dtype": str(config.data_type).removeprefix("torch."),
            "max_dispatch_tokens_per_rank": config.max_num_inp_token_per_rank,
            "recv_buffer_rows": config.max_recv,
        }


@lru_cache(maxsize=4)
def make_dispatcher(
    config: MoriConfig,
    group: ProcessGroupHandle,
    num_experts: int,
    hidden: int,
    top_k: int,
    dtype: torch.dtype,
    device: torch.device,
    row_dtype: torch.dtype | None = None,
) -> MoriEPDispatcher:
    """The dispatcher that all layers of these sizes share; the first call is collective and allocates the buffers."""
    kernel = choose_kernel(config) if current_platform.kind == "hip" else None
    sizes = plan_exchange(config, kernel, group.rank, num_experts, hidden, top_k, dtype, row_dtype)
    transport: EpTransport
    if kernel is not None:
        transport = MoriTransport(sizes, kernel, group)
    else:
        transport = PortableTransport(sizes, group, device, gathered=device.type != "cpu")
    dispatcher = MoriEPDispatcher(transport, device)
    logger.info("expert parallelism: %s", ", ".join(f"{k}={v}" for k, v in dispatcher.describe().items()))
    return dispatcher

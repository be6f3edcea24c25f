"""The MORI protocol of expert parallelism: MORI itself on HIP, the portable transport elsewhere.

``MoriEPDispatcher`` is what layers use. Each direction is two calls, a and b: with MORI's AsyncLL kernel the first only
starts copies, and what the caller does before the second runs beside them.
"""

from __future__ import annotations

import inspect
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from sglang.kernels.ops.quant.group_fp8 import GROUP, quantize_groups
from sglang.srt.distributed import ProcessGroupHandle
from sglang.srt.layers.moe.token_dispatcher.base import (
    DispatchError,
    EpConfig,
    EpTransport,
    ExchangeConfigError,
    RecvBatch,
)
from sglang.srt.layers.moe.token_dispatcher.capacity import source_limit
from sglang.srt.layers.moe.token_dispatcher.config import MoriConfig
from sglang.srt.layers.moe.token_dispatcher.gauge import RecvGauge
from sglang.srt.layers.moe.token_dispatcher.portable import PortableTransport
from sglang.srt.platforms import current_platform

logger = logging.getLogger(__name__)

GROUP_NAME = "mori"
# Ranks of one node, and of one domain that the single-node kernel spans.
NODE = 8
WAVE = 64
# Fields of MORI's configuration that a release may lack, and the value at which their absence changes nothing.
# "any": a matter of speed alone.
DROPPABLE: dict[str, Any] = {
    "num_qp_per_pe": "any",
    "rdma_block_num": 0,
    "use_external_inp_buf": True,
    "max_total_recv_tokens": 0,
    "quant_type": "none",
}
# SGLANG_MORI_COMBINE_DTYPE -> MORI's codec of combined rows.
COMBINE_CODECS = {"auto": "none", "bf16": "none", "fp8": "fp8_blockwise", "fp8_direct_cast": "fp8_direct_cast"}


@dataclass(frozen=True)
class MoriKernel:
    """One of MORI's kernels and its launch geometry."""

    name: str
    block_num: int
    warp_num_per_block: int
    rdma_block_num: int = 0

    @property
    def is_two_phase(self) -> bool:
        return self.name == "AsyncLL"


INTRA_NODE = MoriKernel("IntraNode", 80, 16)
INTER_NODE = MoriKernel("InterNodeV1", 64, 8, 32)
INTER_NODE_LL = MoriKernel("InterNodeV1LL", 64, 8, 32)
ASYNC_LL = MoriKernel("AsyncLL", 64, 8, 32)
MORI_KERNELS = (INTRA_NODE, INTER_NODE, INTER_NODE_LL, ASYNC_LL)


def choose_kernel(config: MoriConfig) -> MoriKernel:
    """AsyncLL for low latency or copy engines (MORI_ENABLE_SDMA), else by the size of the world and of the limit.

    Raises ExchangeConfigError for what the kernel cannot serve, or would answer by writing past its buffers.
    """
    world = config.world_size
    if config.low_latency or config.copy_engines:
        kernel = ASYNC_LL
    elif world <= NODE:
        kernel = INTRA_NODE
    else:
        kernel = INTER_NODE_LL if config.max_dispatch_tokens <= config.inter_kernel_switch else INTER_NODE
    per_node = min(world, NODE)
    if per_node & (per_node - 1) or world % per_node:
        raise ExchangeConfigError(f"MORI needs 1, 2, 4 or whole nodes of 8 ranks, got --tp-size {world}")
    if kernel is ASYNC_LL and world > WAVE:
        raise ExchangeConfigError(f"MORI's AsyncLL serves at most {WAVE} ranks, got {world}: use --deepep-mode normal")
    if kernel is INTRA_NODE and 0 < config.max_recv_tokens < world:
        raise ExchangeConfigError(
            f"SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS={config.max_recv_tokens} is below {world}, one row of each rank, "
            f"which MORI's IntraNode kernel needs: set at least {world}, or use --deepep-mode low_latency"
        )
    if config.combine_dtype == "fp8" and kernel not in (INTRA_NODE, ASYNC_LL):
        raise ExchangeConfigError(f"SGLANG_MORI_COMBINE_DTYPE=fp8 is not offered by MORI's {kernel.name}: use bf16")
    return kernel


def check_mori_compatibility(config_kwargs: dict[str, Any], config_class: type) -> dict[str, Any]:
    """The arguments that ``config_class`` takes; a field it lacks is left out where that changes nothing, and named.

    Raises ExchangeConfigError that names every field whose absence would change memory, results or the kernel.
    """
    known = inspect.signature(config_class).parameters
    missing = {name: value for name, value in config_kwargs.items() if name not in known}
    refused = [name for name, value in missing.items() if DROPPABLE.get(name, missing) not in ("any", value)]
    if refused:
        asked = ", ".join(f"{name}={missing[name]!r}" for name in refused)
        raise ExchangeConfigError(
            f"this MORI's {config_class.__module__}.{config_class.__name__} lacks {asked}: without them it would run "
            "otherwise than asked. Install MORI 1.1.0 or later (its first op, not dispatch_combine_v2), or unset what "
            "asks for them (max_total_recv_tokens: SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS)"
        )
    if missing:
        logger.warning("this MORI does not know %s, which changes no result: left out", ", ".join(sorted(missing)))
    return {name: value for name, value in config_kwargs.items() if name in known}


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
    """Give MORI's symmetric memory the ranks of ``group``, which must run one release; once a process."""
    mori = _import_mori()
    version = str(getattr(mori, "__version__", "unknown"))
    versions = group.all_gather_ints([zlib.crc32(version.encode())])
    if any(theirs != versions[0] for theirs in versions):
        odd = [rank for rank, theirs in enumerate(versions) if theirs != versions[0]]
        raise ExchangeConfigError(f"ranks {odd} run another MORI than rank 0 (this rank: {version}): install one")
    torch._C._distributed_c10d._register_process_group(GROUP_NAME, group.cpu_group)
    mori.shmem.shmem_torch_process_group_init(GROUP_NAME)


def init_mori_op(config: EpConfig, kernel: MoriKernel, group: ProcessGroupHandle) -> Any:
    """MORI's dispatch and combine op for ``config``; all ranks of ``group`` call it."""
    mori = _import_mori()
    _join_shmem(group)
    kernel_types = mori.ops.EpDispatchCombineKernelType
    if not hasattr(kernel_types, kernel.name):
        raise ExchangeConfigError(f"this MORI has no kernel {kernel.name}: install MORI 1.1.0 or later")
    asked = {
        "data_type": config.data_type,
        "rank": config.rank,
        "world_size": config.world_size,
        "hidden_dim": config.hidden_dim,
        "scale_dim": config.scale_dim,
        "scale_type_size": config.scale_type.itemsize,
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
    config_class = mori.ops.EpDispatchCombineConfig
    op = mori.ops.EpDispatchCombineOp(config_class(**check_mori_compatibility(asked, config_class)))
    if op.max_num_tokens_to_recv() != config.max_recv:
        raise ExchangeConfigError(
            f"MORI allocated {op.max_num_tokens_to_recv()} received rows where {config.max_recv} are planned "
            f"(max_total_recv_tokens={config.max_total_recv_tokens}): this release rounds otherwise"
        )
    return op


class MoriTransport:
    """``EpTransport`` over MORI's op; every dispatch of a two-phase op is paired with its recv."""

    def __init__(self, config: EpConfig, kernel: MoriKernel, group: ProcessGroupHandle) -> None:
        if config.num_experts_per_token >= WAVE:
            raise ExchangeConfigError(f"MORI takes fewer than {WAVE} experts a token: {config.num_experts_per_token}")
        self.config, self._kernel = config, kernel
        self._op = init_mori_op(config, kernel, group)
        # What a send reads must live until its recv.
        self._held: tuple[object, ...] = ()

    def describe(self) -> str:
        mori = _import_mori()
        fake = " FAKE" if "mori" in current_platform.fakes else ""
        return f"MORI {getattr(mori, '__version__', 'of unknown version')}{fake} ({self._kernel.name})"

    def dispatch_send(
        self,
        x: torch.Tensor,
        weights: torch.Tensor,
        scales: torch.Tensor | None,
        indices: torch.Tensor,
        rows_of_ranks: Sequence[int] | None = None,
    ) -> RecvBatch:
        self.config.check_input(x, weights, scales, indices)
        # MORI counts on the device and does not ask whether the rows fit, so the most that can arrive is checked here.
        if rows_of_ranks is not None and sum(rows_of_ranks) > self.config.max_recv:
            raise DispatchError(f"ranks bring {list(rows_of_ranks)} rows to buffers of {self.config.max_recv}")
        self._held = (x.contiguous(), weights.contiguous(), scales, indices.contiguous())
        batch = RecvBatch(*self._op.dispatch(*self._held))
        types = (batch.hidden.dtype, batch.weights.dtype, batch.indices.dtype, batch.total_recv.dtype)
        if types != (self.config.data_type, torch.float32, torch.int32, torch.int32):
            raise DispatchError(f"MORI delivered {types}: its release has another contract than 1.1 to 1.2")
        return batch

    def dispatch_recv(self) -> None:
        if self._kernel.is_two_phase:
            self._op.dispatch_recv()

    def combine_send(self, y: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        self._held = (y, None, indices.contiguous())
        return self._op.combine(*self._held)[0]

    def combine_recv(self) -> None:
        if self._kernel.is_two_phase:
            self._op.combine_recv()

    def get_dispatch_src_token_pos(self) -> torch.Tensor:
        return self._op.get_dispatch_src_token_pos()


class MoriEPDispatcher:
    """Sends a rank's rows to the ranks of their experts and brings the sums back, a step of four calls in this order:
    ``dispatch_a``, ``dispatch_b``, ``combine_a``, ``combine_b``. All ranks make the same calls, also without rows.
    """

    STAGES = ("dispatch_a", "dispatch_b", "combine_a", "combine_b")

    def __init__(self, transport: EpTransport, device: torch.device) -> None:
        self.transport = transport
        self.config = transport.config
        self.gauge = RecvGauge(self.config.max_recv, device)
        self._next = 0
        self._ids: torch.Tensor | None = None
        self._batch: RecvBatch | None = None
        self._out: torch.Tensor | None = None

    def _enter(self, stage: str) -> None:
        if self.STAGES[self._next] != stage:
            raise DispatchError(f"{stage} was called where {self.STAGES[self._next]} comes next")
        self._next = (self._next + 1) % len(self.STAGES)

    def dispatch_a(
        self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, rows_of_ranks: Sequence[int] | None = None
    ) -> None:
        """Start to send rows x [T, H] with weights [T, K] float32 and global ids [T, K] int32.

        They travel in the configured type: 8-bit ones are quantised here, by groups of 128 columns.
        """
        self._enter("dispatch_a")
        rows, scales = quantize_groups(x, self.config.data_type) if self.config.scale_dim else (x, None)
        self._ids = ids
        self._batch = self.transport.dispatch_send(rows, weights, scales, ids, rows_of_ranks)

    def dispatch_b(self) -> RecvBatch:
        """What arrived; valid until the next ``dispatch_a``."""
        self._enter("dispatch_b")
        self.transport.dispatch_recv()
        assert self._batch is not None
        return self._batch

    def combine_a(self, y: torch.Tensor) -> None:
        """Start to send back what the experts made of the received rows: y [>= total_recv, H]."""
        self._enter("combine_a")
        assert self._ids is not None
        self._out = self.transport.combine_send(y, self._ids)

    def combine_b(self) -> torch.Tensor:
        """The sums [T, H] of this rank's rows; a view that the next combine overwrites."""
        self._enter("combine_b")
        self.transport.combine_recv()
        assert self._out is not None and self._ids is not None
        return self._out[: self._ids.shape[0]]

    def describe(self) -> dict[str, Any]:
        """What carries the tokens and how much it may carry, for the log and /server_info."""
        config = self.config
        return {
            "protocol": "mori",
            "transport": self.transport.describe(),
            "mode": "low_latency" if config.mode == "two_phase" else "normal",
            "world_size": config.world_size,
            "dispatch_dtype": str(config.data_type).removeprefix("torch."),
            "max_dispatch_tokens_per_rank": config.max_num_inp_token_per_rank,
            "recv_buffer_rows": config.max_recv,
        }


def plan_exchange(
    config: MoriConfig,
    kernel: MoriKernel | None,
    rank: int,
    num_experts: int,
    hidden: int,
    top_k: int,
    dtype: torch.dtype,
    row_dtype: torch.dtype | None = None,
) -> EpConfig:
    """Sizes of one rank's exchange by MORI's ``kernel``, or by the portable transport (None).

    row_dtype: the 8-bit type in which the expert weights take rows, if any. Touches no device. Raises
    ExchangeConfigError, which names the variable or flag, for what cannot be served.
    """
    asked = config.dispatch_dtype
    if asked == "fp4" or (asked == "fp8" and row_dtype is None):
        raise ExchangeConfigError(
            f"SGLANG_MORI_DISPATCH_DTYPE={asked} needs {asked} expert weights, and these experts have none: unset it"
        )
    if kernel is not None and dtype not in (torch.bfloat16, torch.float32):
        raise ExchangeConfigError(f"MORI carries bfloat16 and float32, not the model's {dtype}: add --dtype bfloat16")
    # The variable is AMD's alone, and has no effect elsewhere.
    codec = "none" if kernel is None else COMBINE_CODECS[config.combine_dtype]
    if codec != "none" and dtype != torch.bfloat16:
        raise ExchangeConfigError(
            f"SGLANG_MORI_COMBINE_DTYPE={config.combine_dtype} packs bfloat16 alone, the model is {dtype}: unset it"
        )
    if codec == "fp8_blockwise" and config.combine_groups * GROUP != hidden:
        raise ExchangeConfigError(
            f"SGLANG_MORI_COMBINE_DTYPE=fp8 with hidden size {hidden} needs MORI_FP8_COMBINE_SCALE_DIM="
            f"{hidden // GROUP}, found {config.combine_groups}"
        )
    travels = row_dtype if row_dtype is not None and asked != "bf16" else dtype
    is_two_phase = config.low_latency if kernel is None else kernel.is_two_phase
    # Under IntraNode the cap shortens what each rank sends at once, and the op is given none: see source_limit.
    by_source, limit, cap = kernel is INTRA_NODE, config.max_dispatch_tokens, config.max_recv_tokens
    if by_source:
        limit, cap = source_limit(config.world_size, limit, cap), 0
    return EpConfig(
        rank=rank,
        world_size=config.world_size,
        hidden_dim=hidden,
        max_num_inp_token_per_rank=limit,
        num_experts_per_rank=num_experts // config.world_size,
        num_experts_per_token=top_k,
        data_type=travels,
        combine_type=dtype,
        scale_dim=0 if travels is dtype else hidden // GROUP,
        max_total_recv_tokens=cap,
        mode="two_phase" if is_two_phase else "sync",
        combine_wire=codec,
        rows_by_source=by_source,
    )


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

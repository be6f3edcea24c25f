"""What one exchange allocates on a rank, buffer by buffer, and MORI's symmetric heap that holds it.

Read in the source of MORI 1.2.4 (``src/ops/dispatch_combine/dispatch_combine.cpp``, ``src/shmem/init.cpp``,
``src/application/memory/va_manager.cpp``). Releases from 1.1.0 on allocate this or, for InterNodeV1, less.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sglang.srt.layers.moe.token_dispatcher.base import EpConfig
from sglang.srt.layers.moe.token_dispatcher.config import NODE

HEAP_VARIABLE = "MORI_SHMEM_HEAP_SIZE"
KERNELS = ("IntraNode", "InterNodeV1", "InterNodeV1LL", "AsyncLL")
MIB = 1 << 20
# To a peer, as the op is configured here.
QUEUE_PAIRS = 2
# The static heap aligns what it hands out, and starts with a gap and its own synchronisation words. In virtual-memory
# mode an allocation may instead skip to the next chunk. The spare room is for small buffers in which releases differ.
ALIGNMENT, HEAP_START, VMM_CHUNK, HEAP_SPARE = 256, 256 + 1024, 64 * MIB, 64 * MIB
# At most, on average: ids and weights are five, signals seven, most others one.
ALLOCATIONS_A_BUFFER = 3
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30}


@dataclass(frozen=True)
class ExchangeBuffer:
    """One allocation of a rank in bytes, on the symmetric heap or outside it; ``made_of`` states what it holds."""

    name: str
    num_bytes: int
    made_of: str
    on_heap: bool = True


def exchange_buffers(config: EpConfig, kernel: str, codec_groups: int = 56) -> tuple[ExchangeBuffer, ...]:
    """All allocations of MORI's op under ``kernel``, one of KERNELS, or of the "portable" transport.

    codec_groups: MORI_FP8_COMBINE_SCALE_DIM, used when ``config.combine_wire`` is blockwise.
    """
    world, limit, recv = config.world_size, config.max_num_inp_token_per_rank, config.max_recv
    top_k, sent, nodes = config.num_experts_per_token, world * limit, world // min(world, NODE)
    # MORI sizes every row for the widest type.
    sent_type, back_type = config.data_type.itemsize, config.combine_type.itemsize
    hidden = config.hidden_dim * max(sent_type, back_type)
    scales = config.scale_dim * 4  # float32
    codec = codec_groups * 4 if config.combine_wire == "fp8_blockwise" else 0
    record = hidden + 8 * top_k + 4 + scales  # hidden, ids, weights, source, scales
    if kernel == "portable":
        row = config.hidden_dim * sent_type + 8 * top_k + scales
        received = ExchangeBuffer("received rows", recv * row + 4, "R records", on_heap=False)
        out = limit * config.hidden_dim * back_type
        return received, ExchangeBuffer("combine output", out, "limit rows", on_heap=False)
    # (name, rows, bytes of a row, what it is made of)
    staged = ("combine input", recv, record if not codec else record - scales + codec, "R records")
    rows = [("dispatch output", recv, hidden, "R rows"), ("combine output", limit, hidden, "limit rows")]
    if kernel == "IntraNode":
        rows.append(staged)
    elif kernel in ("InterNodeV1", "InterNodeV1LL"):
        rows += [
            ("combine input", recv, record, "R records"),
            ("staging", 2 * nodes * limit, record, "2 x nodes x limit records"),
            ("dispatch input", nodes * limit, record, "nodes x limit records"),
            ("dispatch staging", limit, record, "limit records"),
        ]
    elif kernel == "AsyncLL":
        names = ("dispatch input", "combine input", "staging")
        rows += [(name, sent, record, "W x limit records, whatever the cap") for name in names]
    else:
        raise ValueError(f"no plan for MORI kernel {kernel!r}: known are {', '.join(KERNELS)}")
    signals = 2 * 8 * world * QUEUE_PAIRS + (32 + 64) * world + 8 * nodes + 4 + 8 * nodes * limit
    rows += [
        ("ids and weights", recv, 5 * 4 * top_k, "5 x R x top-k x 4 bytes"),
        ("scales", recv, max(scales, codec) + scales, "R rows, in and out"),
        ("source map", sent * config.num_experts_per_rank, 4, "W x limit x local experts x 4 bytes"),
        ("signals", 1, signals, "counters and flags"),
    ]
    buffers = [ExchangeBuffer(name, count * size, made_of) for name, count, size, made_of in rows if count * size]
    maps = 5 * 4 * sent * config.num_experts_per_rank + nodes * limit * (4 * top_k + 4 + 8)
    text = "5 x W x limit x local experts x 4 bytes, and flags"
    return (*buffers, ExchangeBuffer("order maps", maps, text, on_heap=False))


def heap_bytes(buffers: Sequence[ExchangeBuffer], is_vmm: bool = False) -> int:
    """Bytes that MORI_SHMEM_HEAP_SIZE must at least say, in whole MiB: buffers, what alignment takes, spare room."""
    lost = ALLOCATIONS_A_BUFFER * len(buffers) * (VMM_CHUNK if is_vmm else ALIGNMENT)
    needed = HEAP_START + lost + HEAP_SPARE + sum(buffer.num_bytes for buffer in buffers if buffer.on_heap)
    return -(-needed // MIB) * MIB


def parse_heap_size(text: str) -> int:
    """Bytes of a size as MORI reads it: an integer and K, M or G (also KB, KiB, …), all binary; raises ValueError."""
    match = re.fullmatch(r"(\d+)(?:([KMG])(?:I?B)?)?", text.strip().upper())
    if match is None:
        raise ValueError(f"{HEAP_VARIABLE}={text!r} is not a size as MORI reads it: use an integer with K, M or G")
    return int(match[1]) << _SHIFTS[match[2] or ""]


@dataclass(frozen=True)
class HeapPlan:
    """The heap of a rank in bytes, what must be set for it, and what is wrong with the one that is set."""

    size: int
    variables: dict[str, str] = field(default_factory=dict)
    problem: str = ""


def plan_heap(buffers: Sequence[ExchangeBuffer], environ: Mapping[str, str]) -> HeapPlan:
    """The heap that ``environ`` gives or, where it says nothing, the one to set."""
    mode, text = environ.get("MORI_SHMEM_MODE", "").lower(), environ.get(HEAP_VARIABLE, "")
    if mode == "isolation":  # no heap: each buffer is an allocation of its own
        return HeapPlan(sum(buffer.num_bytes for buffer in buffers if buffer.on_heap))
    needed = heap_bytes(buffers, is_vmm=mode == "vmm_heap")
    fix = f"set {needed // MIB}M, or unset it: the launch then sets it"
    if not text:
        return HeapPlan(needed, {HEAP_VARIABLE: f"{needed // MIB}M"})
    try:
        size = parse_heap_size(text)
    except ValueError as error:
        return HeapPlan(needed, problem=f"{error}; {fix}")
    if size >= needed:
        return HeapPlan(size)
    on_heap = [buffer for buffer in buffers if buffer.on_heap]
    parts = " + ".join(f"{buffer.name} {buffer.num_bytes / MIB:.1f}" for buffer in on_heap)
    room = (needed - sum(buffer.num_bytes for buffer in on_heap)) / MIB
    problem = f"{HEAP_VARIABLE}={text} is {size / MIB:.1f} MiB, and the exchange needs {needed // MIB} MiB per rank"
    return HeapPlan(needed, problem=f"{problem} ({parts} + room {room:.1f}): {fix}")

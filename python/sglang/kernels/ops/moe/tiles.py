"""Tile sizes of the routed experts' Triton kernels: ``tiles.json``, keyed by arch, chosen by host-known sizes."""

from __future__ import annotations

import functools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

TABLE = Path(__file__).with_name("tiles.json")
# Pairs whose ordering the kernel for few tokens holds in registers.
MAX_FEW_PAIRS = 128


@dataclass(frozen=True)
class MoeTiles:
    """How to run one call: ``path`` is "one", "few" or "many"; the two mappings go to the kernels as they are."""

    path: str
    block_m: int
    gate_up: dict[str, Any]
    down: dict[str, Any]


@functools.cache
def _of_arch(arch: str) -> dict[str, Any]:
    """The checked-in limits of the paths, and rows by bits of a weight and rows per expert."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    if arch not in table:
        logger.warning("no expert tiles for %s in %s: its default is used (benchmark/kernels/tune_moe.py)", arch, TABLE)
    return table.get(arch, table["default"])


@functools.lru_cache(maxsize=1024)
def choose_tiles(
    arch: str, bits: int | str, num_tokens: int, top_k: int, num_experts: int, slots: bool = False
) -> MoeTiles:
    """The tiles for a call with ``num_tokens`` tokens of ``top_k`` experts each, weights of ``bits`` bits.

    ``bits``: "placed 4" for codes as ``place_codes`` has them.
    ``slots``: the operands fit the kernel of ``slots_product``, which then runs where the table has a row for it.
    """
    table = _of_arch(arch)
    pairs = num_tokens * top_k
    rows = table[str(bits)]
    # A table without a row for one token means that few_tokens is better for it (4-bit weights).
    if num_tokens == 1 and "one" in rows and top_k <= table["one_token_max_top_k"]:
        row = rows["one"]
        return MoeTiles("one", row.get("BLOCK_M", 1), row["gate_up"], row["down"])
    if num_tokens <= table["few_tokens"] and pairs <= MAX_FEW_PAIRS:
        row = rows["few"]
        return MoeTiles("few", row["BLOCK_M"], row["gate_up"], row["down"])
    per_expert = pairs / num_experts
    row = rows.get("slots") if slots else None
    if row is None or per_expert <= row["over_rows_per_expert"]:
        row = next(r for r in rows["many"] if r["rows_per_expert"] is None or per_expert <= r["rows_per_expert"])
    return MoeTiles("many", row["BLOCK_M"], row["gate_up"], row["down"])

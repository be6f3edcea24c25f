"""What ``python -m sglang.plan`` prints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

from sglang.srt.arg_groups.parse import Parsed
from sglang.srt.arg_groups.plan import evaluate
from sglang.srt.arg_groups.stream_policy import plan_streams, stream_variables
from sglang.srt.configs.cache_layout import FULL, STATE, SWA
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.layers.moe.token_dispatcher.config import mori_setting_problems
from sglang.srt.layers.moe.token_dispatcher.mori_memory import MIB, heap_bytes
from sglang.srt.model_executor.memory_plan import GIB, ExchangePlan, MemoryPlan, UnitPlan, plan_memory
from sglang.srt.platforms import Platform
from sglang.srt.platforms.cpu import CpuPlatform
from sglang.srt.platforms.cuda import CudaPlatform
from sglang.srt.platforms.rocm import RocmPlatform
from sglang.srt.server_args import ServerArgs, exit_with_errors

# What is planned for; no device is touched.
PLATFORMS: dict[str, type[Platform]] = {"hip": RocmPlatform, "cuda": CudaPlatform, "cpu": CpuPlatform}
# Name and note of the row of each unit: how many, and bytes of one.
UNIT_ROWS = {
    FULL: ("KV", "{} tokens x {} B, and a dummy page"),
    SWA: ("window", "{} tokens x {} B, and two pages for padding and tombstones"),
    STATE: ("recurrent states", "{} slots x {} B, and a dummy"),
}


def report(options: argparse.Namespace, request: Parsed, arch: str) -> int:
    """Print the plan for ``request`` on a device of ``arch``; ``options`` are those of the command. The exit status."""
    platform = PLATFORMS[options.platform]()
    launch = evaluate(request, platform)
    for warning in launch.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if launch.errors:
        exit_with_errors(launch.errors)
    args, config = launch.args, launch.model_config
    assert config is not None
    if problems := mori_setting_problems(args):
        exit_with_errors(problems)
    try:
        plan = plan_memory(args, config, platform.kind, int(options.gpu_memory_gb * GIB), os.environ)
        variables = launch_variables(args, config, plan, platform)
        refusal, sites = config.shared_fusion_refusal(args.moe_a2a_backend), config.text.overlap_sites
        streams = plan_streams(args, refusal, sites, platform=platform, arch=arch, variables=variables)
    except ValueError as error:
        exit_with_errors([str(error)])
    for warning in streams.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    if options.json:
        shown = {**document(plan, args, platform.kind, variables), "arch": arch, "streams": streams.describe()}
        print(json.dumps(shown, indent=2))
    else:
        print("\n".join(table(plan, args, platform.kind, variables)))
        print("\n".join(f"{line}, on {arch}" for line in streams.lines()))
    for problem in plan.problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if plan.problems else 0


def launch_variables(args: ServerArgs, config: ModelConfig, plan: MemoryPlan, platform: Platform) -> dict[str, str]:
    """What the launch would set for the processes of the ranks."""
    heap = None if plan.exchange is None else plan.exchange.heap
    streams = stream_variables(args, config.text.overlap_sites, platform)
    return {**streams, **({} if heap is None else heap.variables)}


def document(plan: MemoryPlan, args: ServerArgs, kind: str, variables: dict[str, str]) -> dict[str, Any]:
    """The plan as JSON: the fields of MemoryPlan and what follows from them."""
    return {
        "platform": kind,
        "ranks": {"tp": args.tp_size, "ep": args.ep_size, "attention_groups": args.attn_dp_size},
        **dataclasses.asdict(plan),
        "exchange_bytes": plan.exchange_bytes,
        "left_for_activations": plan.left,
        "variables": variables,
    }


def table(plan: MemoryPlan, args: ServerArgs, kind: str, variables: dict[str, str]) -> Iterator[str]:
    """The plan for people, line by line."""
    yield f"{args.model_path} on {kind}: tp {args.tp_size}, ep {args.ep_size}, attention groups {args.attn_dp_size}"
    yield f"{'GiB of each rank':<26}{plan.memory / GIB:>10.3f}"
    kernel = "" if plan.exchange is None else f"{plan.exchange.kernel}; heap and maps"
    rows = [
        ("weights", sum(plan.weights.values()), ""),
        *((f"  {name}", size, "") for name, size in plan.weights.items()),
        ("MoE exchange", plan.exchange_bytes, kernel),
        ("request table", plan.request_table_bytes, f"{args.max_running_requests} requests x context x 4 B"),
        *(row for name, unit in plan.units.items() for row in unit_rows(name, unit)),
        ("graphs", plan.graphs_estimate, "an estimate"),
        ("runtime", plan.runtime_estimate, "an estimate: driver, collectives, compiled kernels"),
        ("left for activations", plan.left, ""),
    ]
    for name, size, note in rows:
        if size:
            yield f"  {name:<24}{size / GIB:>10.3f}  {note}".rstrip()
    if plan.exchange is not None:
        yield from exchange_table(plan.exchange, plan.weights.get("routed experts", 0))
    yield f"the launch sets: {', '.join(f'{name}={value}' for name, value in variables.items()) or 'nothing'}"


def unit_rows(name: str, unit: UnitPlan) -> Iterator[tuple[str, int, str]]:
    """Name, bytes and note of what is kept by one kind of unit, and of its pools where tokens have several."""
    title, note = UNIT_ROWS[name]
    note = note.format(unit.size, unit.page_bytes // unit.page_size)
    several = len(unit.parts) > 1
    if name == STATE and several:
        note += f": {' + '.join(f'{pool} {size} B' for pool, size in unit.parts.items())}"
    yield title, unit.num_bytes, note
    pages = unit.num_bytes // unit.page_bytes
    for pool, size in unit.parts.items() if several and name != STATE else ():
        yield f"  {pool}", pages * size, f"{pages * unit.rows[pool]} rows x {size // unit.rows[pool]} B"


def exchange_table(plan: ExchangePlan, expert_bytes: int) -> Iterator[str]:
    """Buffers and heap before and after the receive cap, and the rounds that the cap costs."""
    yield f"{plan.kernel}: {plan.recv_rows} received rows at most, {plan.worst_recv_rows} without a cap"
    yield f"{'MiB of each rank':<26}{'worst case':>12}{'with the cap':>14}"
    chosen = plan.by_kernel[plan.kernel]
    for worst, capped in zip(chosen.worst_case, chosen.with_cap, strict=True):
        note = capped.made_of + ("" if capped.on_heap else ", not on the heap")
        yield f"  {worst.name:<24}{worst.num_bytes / MIB:>12.1f}{capped.num_bytes / MIB:>14.1f}  {note}"
    for kernel, buffers in plan.by_kernel.items() if plan.heap is not None else ():
        sizes = [heap_bytes(each) // MIB for each in (buffers.worst_case, buffers.with_cap)]
        yield f"  {'heap, ' + kernel:<24}{sizes[0]:>12}{sizes[1]:>14}{'  chosen' if kernel == plan.kernel else ''}"
    yield "MoE rounds of a step"
    for step in plan.rounds:
        yield f"  {step.step:<24}{step.worst_case:>12}{step.with_cap:>14}  {step.rows} rows from each attention group"
    if any(step.with_cap > step.worst_case for step in plan.rounds):
        yield f"  a further round exchanges again, and may read all experts again: {expert_bytes / GIB:.2f} GiB a step"

"""The resources of a compiled kernel, read from the metadata of its code object, and the checks of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from sglang.test.amd_gate.driver import LDS_BYTES, MAX_WORKGROUP_LANES, WAVE_LANES, Launch

# Registers per lane on CDNA3 and CDNA4 (vector and accumulation together), allocated by eight; waves per SIMD.
LANE_REGISTERS = 512
REGISTER_GRANULE = 8
MAX_WAVES = 8
SIMDS = 4
# Growth up to which a change counts as noise of the compiler.
MARGIN = 0.10
MARGIN_REGISTERS = 8

_FIELDS = {
    "vgpr": r"\.vgpr_count:\s+(\d+)",
    "agpr": r"\.agpr_count:\s+(\d+)",
    "sgpr": r"\.sgpr_count:\s+(\d+)",
    "vgpr_spills": r"\.vgpr_spill_count:\s+(\d+)",
    "sgpr_spills": r"\.sgpr_spill_count:\s+(\d+)",
    "scratch": r"\.private_segment_fixed_size:\s+(\d+)",
    "wave": r"\.wavefront_size:\s+(\d+)",
}


@dataclass(frozen=True)
class Resources:
    """vgpr: registers per lane, accumulation ones (agpr) included; lds, scratch: bytes; occupancy: waves per SIMD.

    spills counts vector registers; sgpr_spills scalar ones, which go to lanes of a vector register, not to memory.
    """

    vgpr: int
    agpr: int
    lds: int
    spills: int
    scratch: int
    occupancy: int
    sgpr_spills: int


def read_resources(launch: Launch, arch: str) -> Resources:
    """The resources of a kernel compiled for ``arch``; ValueError when its code object does not state them."""
    found = _metadata(launch)
    lds = int(launch.metadata["shared"])
    return Resources(
        vgpr=found["vgpr"],
        agpr=found["agpr"],
        lds=lds,
        spills=found["vgpr_spills"],
        scratch=found["scratch"],
        occupancy=occupancy(arch, found["vgpr"], lds, int(launch.metadata["num_warps"])),
        sgpr_spills=found["sgpr_spills"],
    )


def occupancy(arch: str, vgpr: int, lds: int, num_warps: int) -> int:
    """Waves per SIMD that registers and LDS allow; 0 if no workgroup fits."""
    granted = max(REGISTER_GRANULE, -(-vgpr // REGISTER_GRANULE) * REGISTER_GRANULE)
    waves = min(MAX_WAVES, LANE_REGISTERS // granted)
    if lds:
        waves = min(waves, -(-(LDS_BYTES[arch] // lds) * num_warps // SIMDS))
    return waves


def unfit(needs: Resources, arch: str) -> list[str]:
    """Why a kernel with these resources is unfit for ``arch``: one sentence per reason."""
    problems = []
    if needs.spills:
        problems.append(f"spills {needs.spills} registers")
    if needs.scratch:
        problems.append(f"uses {needs.scratch} bytes of scratch per lane")
    if needs.lds > LDS_BYTES[arch]:
        problems.append(f"needs {needs.lds} bytes of LDS, {arch} has {LDS_BYTES[arch]}")
    return problems


def violations(launch: Launch, arch: str, expect: Sequence[str]) -> list[str]:
    """Why the kernel is unfit, without regard to earlier rows: one sentence per reason."""
    found, problems = _metadata(launch), unfit(read_resources(launch, arch), arch)
    lanes = int(launch.metadata["num_warps"]) * WAVE_LANES
    if found["wave"] != WAVE_LANES or launch.metadata["warp_size"] != WAVE_LANES:
        problems.append(f"is compiled for waves of {found['wave']} lanes, {arch} runs {WAVE_LANES}")
    if lanes > MAX_WORKGROUP_LANES:
        problems.append(f"has {lanes} lanes in a workgroup ({launch.metadata['num_warps']} warps), at most 1024 fit")
    problems += [f"lacks the instruction {want}" for want in expect if not re.search(want, launch.assembly)]
    return problems


def drift(now: Resources, before: Resources) -> list[str]:
    """In what ``now`` is worse than the recorded ``before`` by more than the margin: one sentence per resource."""
    problems = []
    if now.vgpr > before.vgpr + max(MARGIN_REGISTERS, MARGIN * before.vgpr):
        problems.append(f"registers grew from {before.vgpr} to {now.vgpr}")
    if now.lds > before.lds * (1 + MARGIN):
        problems.append(f"LDS grew from {before.lds} to {now.lds} bytes")
    if now.sgpr_spills > before.sgpr_spills + MARGIN_REGISTERS:
        problems.append(f"scalar spills grew from {before.sgpr_spills} to {now.sgpr_spills}")
    if now.occupancy < before.occupancy:
        problems.append(f"occupancy fell from {before.occupancy} to {now.occupancy} waves")
    return problems


def _metadata(launch: Launch) -> dict[str, int]:
    found = {}
    for name, pattern in _FIELDS.items():
        match = re.search(pattern, launch.assembly)
        if match is None:
            raise ValueError(f"kernel {launch.kernel}: its code object has no {pattern.split(':')[0]!r} note")
        found[name] = int(match[1])
    return found

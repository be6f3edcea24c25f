"""Which mode serves shared experts fastest at which number of tokens: measurements, and the choice made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# A mode is replaced only by one that is faster by more than this share, and by more than runs of the two differ.
MARGIN = 0.01


@dataclass(frozen=True)
class ModeTimes:
    """Decode steps of one model on one device. where: device, versions, date, model, command.

    rows: tokens -> (ms by mode, how far repeated runs of a mode are apart, as a share).
    """

    where: str
    rows: Mapping[int, tuple[Mapping[str, float], float]]


# (site, arch) -> times; benchmark/shared_experts/bench_shared_experts.py prints an entry. No entry: not measured.
MEASURED: dict[tuple[str, str], ModeTimes] = {
    ("qwen3_5.shared_experts", "sm_90"): ModeTimes(
        "one H200, torch 2.11.0+cu130, triton 3.6.0, 2026-11-22, qwen3.5-35b-a3b-20l, "
        "bench_shared_experts.py --input-len 1024 --steps 24 --runs 3",
        {
            1: ({"fused": 2.017, "overlap": 2.2461, "serial": 2.3425}, 0.0302),
            8: ({"fused": 3.9537, "overlap": 4.0099, "serial": 4.1505}, 0.0113),
            32: ({"fused": 8.067, "overlap": 8.0629, "serial": 8.2651}, 0.0102),
            128: ({"fused": 12.786, "overlap": 12.8511, "serial": 12.9438}, 0.0144),
        },
    ),
    # The shared experts get every row, so from some size on they are whole products of their own, which cuBLAS does
    # better than the routed experts' small tiles.
    ("deepseek.shared_experts", "sm_90"): ModeTimes(
        "one H200, torch 2.11.0+cu130, triton 3.6.0, 2026-11-22, deepseek-v2-lite, fastest of the runs, "
        "bench_shared_experts.py --input-len 1024 --steps 24 --runs 5",
        {
            1: ({"fused": 2.776, "overlap": 2.952, "serial": 3.202}, 0.0702),
            2: ({"fused": 3.792, "overlap": 3.833, "serial": 4.184}, 0.01),
            4: ({"fused": 4.939, "overlap": 4.891, "serial": 5.293}, 0.017),
            8: ({"fused": 6.511, "overlap": 6.48, "serial": 6.887}, 0.0193),
            16: ({"fused": 8.553, "overlap": 8.323, "serial": 8.834}, 0.0639),
            32: ({"fused": 9.823, "overlap": 9.677, "serial": 10.071}, 0.0816),
            64: ({"fused": 10.585, "overlap": 10.134, "serial": 10.532}, 0.0565),
            128: ({"fused": 12.392, "overlap": 11.523, "serial": 11.517}, 0.0166),
        },
    ),
}


def choose_modes(available: Sequence[str], times: ModeTimes | None) -> tuple[tuple[int | None, str], ...]:
    """(most tokens, mode) ascending, the last without limit, out of ``available``, the preferred one first.

    From one measured size to the next the mode stays unless another wins by more than the noise, so that neighbouring
    graph buckets do not alternate. Sizes between two rows are padded to the larger, and take its mode.
    """
    if times is None or len(available) == 1:
        return ((None, available[0]),)
    modes: list[tuple[int | None, str]] = []
    current = available[0]
    for tokens, (ms, spread) in sorted(times.rows.items()):
        best = min(available, key=lambda mode: ms[mode])
        if ms[best] < ms[current] * (1 - max(MARGIN, spread)):
            current = best
        if modes and modes[-1][1] == current:
            modes.pop()
        modes.append((tokens, current))
    return (*modes[:-1], (None, current))

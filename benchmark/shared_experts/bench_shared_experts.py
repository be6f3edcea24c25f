"""Decode steps with shared experts fused, overlapped, or computed before the routed ones, at each number of tokens.

    python benchmark/shared_experts/bench_shared_experts.py --model-path DIR/qwen3.5-35b-a3b-20l --load-format dummy
        [--tokens 1 2 4 8 16 32 64 128] [--modes fused overlap serial fused+gdn_qkvz_ba fused+qk_norm]
        [--input-len 1024] [--steps 32] [--runs 5] [flags of the server]

The model is loaded once: all modes read the same weights, each through decode graphs of its own. A mode is how shared
experts run, and after + the other sites that overlap. Runs of all modes alternate at each size, with the same input
tokens; a run is the mean step of ``--steps`` launched one after the other. Prints a table, which mode wins, what the
chooser takes (an entry for ``srt/utils/shared_modes.py``), and how much of each side overlapped the main work.
The chooser takes the fastest run of each mode, as a busy host only adds time; medians and ranges are printed too.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sglang.bench_utils.one_batch import StaticBatch
from sglang.bench_utils.one_batch_cli import load
from sglang.bench_utils.timing import timed
from sglang.srt.arg_groups.stream_policy import SITE_RULES
from sglang.srt.environ import envs
from sglang.srt.model_executor.memory_plan import graph_buckets
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner_build import capture_graphs, make_backend, prove_graphs
from sglang.srt.model_executor.step_graphs import StepGraphs
from sglang.srt.platforms import current_platform
from sglang.srt.server_args import ServerArgs, exit_with_errors, get_global_server_args
from sglang.srt.utils.logging_config import configure_logging
from sglang.srt.utils.multi_stream_utils import FUSED, OVERLAP, SERIAL, StreamOverlap, trace_reader
from sglang.srt.utils.shared_modes import ModeTimes, choose_modes

SHARED = {rule.name for rule in SITE_RULES if rule.shared_experts}
MODES = ("fused", "overlap", "serial", "fused+gdn_qkvz_ba", "fused+qk_norm")


def set_mode(runner: ModelRunner, mode: str, traced: bool = False) -> None:
    """Rebuild every overlap of the model for ``mode``; graphs captured before keep what they recorded."""
    shared, *beside = mode.split("+")
    stream = current_platform.create_stream() if current_platform.supports_streams else None
    for module in runner.model.modules():
        if not hasattr(module, "overlap"):
            continue
        old = module.overlap.site
        if old.name in SHARED:
            site = replace(old, enabled=shared == OVERLAP, modes=((None, shared),))
        else:
            site = replace(old, enabled=old.name.split(".")[1] in beside)
        with envs.SGLANG_TRACE_OVERLAP.override(traced):
            module.overlap = StreamOverlap(stream, site)


def capture(runner: ModelRunner, mode: str, traced: bool = False) -> StepGraphs | None:
    """The decode graphs of ``mode``, with an attention backend of their own; None where there are none."""
    set_mode(runner, mode, traced)
    args = get_global_server_args()
    if args.disable_cuda_graph:
        return None
    runner.attn_backend = make_backend(args, runner.loaded, runner.memory, runner.pools)
    graphs = capture_graphs(runner, graph_buckets(args))
    prove_graphs(runner, graphs)
    return graphs


def run_steps(runner: ModelRunner, batch: StaticBatch, tokens: list[torch.Tensor]) -> float:
    """Milliseconds of a step."""
    _, seconds = timed(lambda: [batch.decode(ids) for ids in tokens])
    return seconds * 1e3 / len(tokens)


def time_size(
    runner: ModelRunner, allocator: Any, graphs: dict[str, StepGraphs | None], size: int, args: argparse.Namespace
) -> dict[str, list[float]]:
    """ms of each run by mode."""
    vocab = runner.model_config.vocab_size
    times: dict[str, list[float]] = {mode: [] for mode in graphs}
    prompts = np.random.default_rng(size).integers(0, vocab, size=(size, args.input_len)).tolist()
    for run in range(args.runs + 1):
        tokens = [torch.randint(0, vocab, (size,), device=runner.device) for _ in range(args.steps)]
        for mode, captured in graphs.items():
            if captured is None:
                set_mode(runner, mode)
            runner.decode_graphs = captured
            batch = StaticBatch(runner, allocator, size)
            # Prompts one at a time: a prefill step has bounds of its own.
            fill(batch, prompts, args.input_len)
            ms = run_steps(runner, batch, tokens)
            batch.release()
            if run:  # the first warms up
                times[mode].append(ms)
    return times


def fill(batch: StaticBatch, prompts: list[list[int]], length: int) -> None:
    """Prefill in steps of at most 8192 tokens."""
    chunk = max(1, 8192 // len(prompts))
    for start in range(0, length, chunk):
        batch.extend([prompt[start : start + chunk] for prompt in prompts])


def print_size(size: int, times: dict[str, list[float]]) -> tuple[dict[str, float], float]:
    """One row, and what the chooser takes: the fastest runs, and how far from its fastest a mode's median is."""
    fastest = {mode: min(runs) for mode, runs in times.items()}
    medians = {mode: statistics.median(runs) for mode, runs in times.items()}
    spread = max(medians[mode] / fastest[mode] - 1 for mode in times if "+" not in mode)
    best = min(fastest, key=lambda mode: fastest[mode])
    cells = "  ".join(f"{medians[mode]:8.3f} ({min(runs):.3f} .. {max(runs):.3f})" for mode, runs in times.items())
    print(f"{size:6d}  {cells}  {best}, {fastest['serial'] / fastest[best]:.3f} times serial; spread {spread:.1%}")
    return fastest, spread


def print_choice(model: str, rows: dict[int, tuple[dict[str, float], float]], site: str, command: str) -> None:
    where = f"{current_platform.describe()}, {datetime.date.today()}, {model}, {command}"
    print(f"\nfor MEASURED of shared_modes.py:\n    ({site!r}, {current_platform.arch!r}): ModeTimes(")
    print(f"        {where!r},\n        {{")
    kept = {
        size: ({mode: round(ms[mode], 4) for mode in (FUSED, OVERLAP, SERIAL) if mode in ms}, round(spread, 4))
        for size, (ms, spread) in rows.items()
    }
    for size, row in kept.items():
        print(f"            {size}: {row!r},")
    print("        },\n    ),")
    for available in ((FUSED, OVERLAP, SERIAL), (FUSED, SERIAL)):
        if all(mode in ms for mode in available for ms, _ in kept.values()):
            print(f"chosen of {', '.join(available)}: {choose_modes(available, ModeTimes(where, kept))}")


def print_ratios(rows: dict[int, tuple[dict[str, float], float]]) -> None:
    """What each further site makes of a step: the fastest run with it over the fastest without, at each size."""
    for mode in next(iter(rows.values()))[0]:
        base = mode.partition("+")[0]
        if base != mode:
            ratios = ", ".join(f"{ms[mode] / ms[base]:.3f} at {size}" for size, (ms, _) in rows.items() if base in ms)
            print(f"{mode} over {base}: {ratios}")


def print_traces(runner: ModelRunner, allocator: Any, modes: list[str], args: argparse.Namespace) -> None:
    """Shares of the sides that overlapped the main work, as captured; the events cost time, so it is no timing."""
    for mode in modes:
        runner.decode_graphs = capture(runner, mode, traced=True)
        read = trace_reader(runner.model)
        for size in args.tokens:
            batch = StaticBatch(runner, allocator, size)
            batch.extend([[5, 6, 7]] * size)
            for _ in range(4):
                batch.decode(torch.full((size,), 9, device=runner.device))
            batch.release()
        for row in read():
            if row["captured"]:
                print(
                    f"{mode}: {row['site']} at {row['num_tokens']}: side {row['side_us']:.1f} us, main "
                    f"{row['main_us']:.1f} us, {row['overlap_fraction']:.0%} of the side overlapped"
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--modes", nargs="+", default=None)
    parser.add_argument("--input-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--runs", type=int, default=5)
    ServerArgs.add_cli_args(parser)
    args = parser.parse_args()
    server_args = replace(ServerArgs.from_cli_args(args), cuda_graph_bs=args.tokens)
    configure_logging(server_args.log_level, "main")
    runner, allocator, _ = load(server_args, args.tokens)
    if not runner.model.num_fused_shared_experts:
        exit_with_errors([f"shared experts are not fused: {runner.loaded.streams.fusion.reason}"])
    names = {module.overlap.site.name for module in runner.model.modules() if hasattr(module, "overlap")}
    there = {name.split(".")[1] for name in names}
    modes = args.modes or [mode for mode in MODES if set(mode.split("+")[1:]) <= there]
    if not current_platform.supports_streams:
        modes = [mode for mode in modes if mode in (FUSED, SERIAL)]
    modes = list(dict.fromkeys([*modes, SERIAL]))  # the measure of the others
    with torch.inference_mode():
        graphs = {mode: capture(runner, mode) for mode in modes}
        print(
            f"# {current_platform.describe()}; {args.input_len} tokens in, ms per step: median of {args.runs} (range)"
        )
        print("tokens  " + "  ".join(modes))
        rows = {size: print_size(size, time_size(runner, allocator, graphs, size, args)) for size in args.tokens}
        print_ratios(rows)
        command = f"bench_shared_experts.py --input-len {args.input_len} --steps {args.steps} --runs {args.runs}"
        model = server_args.model_path.rstrip("/").rsplit("/", 1)[-1]
        print_choice(model, rows, next(name for name in names if name in SHARED), command)
        if any(captured is not None for captured in graphs.values()):
            print_traces(runner, allocator, [mode for mode in modes if mode == OVERLAP or "+" in mode], args)


if __name__ == "__main__":
    main()

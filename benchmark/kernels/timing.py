"""Replayed graphs, their times, and the table that the benches of kernels print."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import triton

from sglang.test.device_time import device_seconds


@dataclass(frozen=True)
class Timed:
    """A row: the calls of one graph; num_bytes, flops: the least that one call moves and computes (0: not counted).

    note: what the last column says.
    """

    name: str
    calls: Sequence[Callable[[], object]]
    num_bytes: float
    flops: float = 0.0
    note: str = ""


def graph_time(calls: Sequence[Callable[[], object]], runs: int = 5, min_seconds: float = 0.02) -> list[float]:
    """Seconds per call, one figure per run: all ``calls`` in one graph, replayed for ``min_seconds`` per run."""
    # The inputs were made on the current stream.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in calls]
        once = max(device_seconds(graph.replay, 2), 1e-6)
        times = max(2, round(min_seconds / once))
        figures = [device_seconds(graph.replay, times) / len(calls) for _ in range(runs)]
    del kept
    return figures


def describe_device() -> str:
    name = torch.cuda.get_device_name()
    return f"{name}, torch {torch.__version__}, triton {triton.__version__}, python {platform.python_version()}"


def bench_parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments that every bench takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object a row as well")
    return parser


def bench(title: str, rows: Iterable[Timed], anchors: Mapping[str, Sequence[float]], args: argparse.Namespace) -> None:
    """Time every row and print it next to its anchors (us, by name); the ratio is ours over the best of them."""
    print(f"# {describe_device()}; {title}; median, min and max of {args.runs} runs")
    print(f"{'case':<28}{'us':>10}{'min':>10}{'max':>10}{'TB/s':>7}{'TFLOP/s':>9}{'anchors':>18}{'ratio':>7}")
    for timed in rows:
        seconds = graph_time(timed.calls, runs=args.runs)
        us, low, high = (1e6 * pick(seconds) for pick in (statistics.median, min, max))
        known = anchors.get(timed.name, ())
        row = {
            "case": timed.name, "us": us, "us_min": low, "us_max": high, "tb_per_s": timed.num_bytes / us / 1e6,
            "tflop_per_s": timed.flops / us / 1e6, "anchors_us": list(known), "note": timed.note,
        }  # fmt: skip
        rates = f"{row['tb_per_s']:7.2f}" + (f"{row['tflop_per_s']:9.1f}" if timed.flops else f"{'-':>9}")
        beside = f"{' / '.join(map(str, known)) or '-':>18}" + (f"{us / min(known):7.2f}" if known else f"{'-':>7}")
        print(f"{timed.name:<28}{us:10.1f}{low:10.1f}{high:10.1f}{rates}{beside}  {timed.note}".rstrip(), flush=True)
        if args.json:
            print(json.dumps(row), flush=True)
        del timed
        torch.cuda.empty_cache()

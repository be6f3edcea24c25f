"""Time that choosing the next token adds to a step: greedy, and sampled with and without filters and penalties.

    python benchmark/kernels/bench_sampling.py [--runs 7] [--batches 1 32 128] [--vocabularies 129280 248320]

Each choice is captured in its own graph, and the graphs are replayed alternately; us, median (min .. max). ``before``
is the form that sorts the vocabulary: edits on a copy, softmax, stable sort, scatter, float64 sums and a search. The
last column is what the new form adds to a greedy choice in the same run.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from functools import partial

import torch
from timing import describe_device

from sglang.kernels.ops.sampling.draw import COUNT, SEEN, draw
from sglang.kernels.ops.sampling.greedy import greedy_sample
from sglang.kernels.ops.sampling.seeded import uniform_from_seed_torch
from sglang.test.device_time import device_seconds
from sglang.test.op_cases.sampling import RowOf, draw_args

Call = Callable[[], object]


def greedy(logits: torch.Tensor) -> object:
    """The best id and whether the row is sound, as a greedy step takes them."""
    return greedy_sample(logits)


def before(args: tuple, counts: torch.Tensor | None) -> object:
    """The same ids as ``draw``, by a sort of the vocabulary."""
    logits, temperatures, top_ks, top_ps, _, _, seeds, positions, wanted = args[:9]
    raw = logits
    if counts is not None:
        logits = logits.clone()
        logits = torch.where(counts > 0, torch.where(logits > 0, logits / 1.1, logits * 1.1), logits)
        logits -= 0.5 * counts + 0.5 * (counts > 0)
    scaled = logits / temperatures.unsqueeze(1)
    probs = torch.softmax(scaled, dim=-1)
    if wanted.top_k or wanted.top_p:
        ordered, order = torch.sort(probs, dim=-1, descending=True, stable=True)
        if wanted.top_k:
            ordered = ordered.masked_fill(torch.arange(ordered.shape[1], device="cuda") >= top_ks.unsqueeze(1), 0.0)
        share = ordered / ordered.sum(dim=-1, keepdim=True)
        ordered = ordered.masked_fill(share.cumsum(dim=-1) - share >= top_ps.unsqueeze(1), 0.0)
        probs = torch.zeros_like(probs).scatter_(1, order, ordered)
    cumulative = probs.to(torch.float64).cumsum(dim=-1)
    target = uniform_from_seed_torch(seeds, positions).unsqueeze(1) * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    last = probs.shape[1] - 1 - (probs > 0).to(torch.uint8).flip(-1).argmax(dim=-1)
    sound = (scaled.amax(-1).abs() < math.inf) & (raw.amax(-1).abs() < math.inf)
    return torch.minimum(ids, last), sound


def choices(batch: int, vocab: int) -> dict[str, tuple[Call, Call | None]]:
    """By name: the choice as it is, and as it was before."""
    logits = torch.randn(batch, vocab, device="cuda")
    counts = (torch.rand(batch, vocab, device="cuda") < 0.005).to(torch.float32)
    edits = {
        "edit_rows": torch.arange(batch, dtype=torch.int32, device="cuda"),
        "marks": torch.where(counts > 0, SEEN | (1 & COUNT), 0).to(torch.int32),
        "penalties": torch.tensor([[0.5, 0.5, 1.1]], device="cuda").repeat(batch, 1),
        "left": torch.zeros(batch, dtype=torch.int32, device="cuda"),
    }
    rows = {"temperature 1": RowOf(), "top-p 0.9": RowOf(top_p=0.9), "top-p 0.9, top-k 50": RowOf(top_k=50, top_p=0.9)}
    found: dict[str, tuple[Call, Call | None]] = {"greedy": (lambda: greedy(logits), None)}
    for name, row in rows.items():
        args = draw_args(logits, row)
        found[name] = (partial(draw, *args), partial(before, args, None))
    edited = draw_args(logits, rows["top-p 0.9, top-k 50"], **edits)
    found["the same, penalties"] = (lambda: draw(*edited), lambda: before(edited, counts))
    peaked = draw_args(logits * 5, RowOf(top_p=0.9))
    found["peaked, top-p 0.9"] = (lambda: draw(*peaked), lambda: before(peaked, None))
    return found


def captured(call: Call, stream: torch.cuda.Stream) -> tuple[torch.cuda.CUDAGraph, object]:
    with torch.cuda.stream(stream):
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            kept = call()
    return graph, kept


def show(values: list[float]) -> str:
    return f"{statistics.median(values):8.1f} ({min(values):.1f} .. {max(values):.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 32, 128))
    parser.add_argument("--vocabularies", type=int, nargs="+", default=(129_280, 248_320))
    parser.add_argument("--profile", action="store_true", help="print the time of each kernel of one choice as well")
    parser.add_argument("--without-before", action="store_true", help="leave out the form that sorts")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(f"# {describe_device()}; us of a replayed choice, median (min .. max) of {args.runs} turns")
    print(f"{'batch x vocabulary':<20}{'choice':<22}{'now':>28}{'before':>30}{'ratio':>7}{'added':>8}")
    for vocab in args.vocabularies:
        for batch in args.batches:
            torch.cuda.synchronize()
            stream, graphs = torch.cuda.Stream(), {}
            for name, (now, old) in choices(batch, vocab).items():
                graphs[name, "now"] = captured(now, stream)
                if old is not None and not args.without_before:
                    graphs[name, "before"] = captured(old, stream)
            figures: dict[tuple[str, str], list[float]] = {key: [] for key in graphs}
            for _ in range(args.runs):
                for key, (graph, _) in graphs.items():
                    figures[key].append(device_seconds(graph.replay, 20) * 1e6)
            base = statistics.median(figures["greedy", "now"])
            for name, form in graphs:
                if form == "now":
                    us, old_us = figures[name, "now"], figures.get((name, "before"))
                    ratio = f"{statistics.median(us) / statistics.median(old_us):7.2f}" if old_us else f"{'-':>7}"
                    print(f"{f'{batch} x {vocab}':<20}{name:<22}{show(us):>28}{show(old_us) if old_us else '-':>30}"
                          f"{ratio}{statistics.median(us) - base:8.1f}", flush=True)  # fmt: skip
            if args.profile:
                profile(graphs)
            del graphs
            torch.cuda.empty_cache()


def profile(graphs: dict) -> None:
    """The kernels of each choice as it is now."""
    for (name, form), (graph, _) in graphs.items():
        if form == "now":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                for _ in range(5):
                    graph.replay()
                torch.cuda.synchronize()
            parts = [f"{e.key[:40]} {e.self_device_time_total / 5:.1f}" for e in found.key_averages()
                     if e.self_device_time_total > 0]  # fmt: skip
            print(f"    {name}: {'; '.join(parts)}")


if __name__ == "__main__":
    main()

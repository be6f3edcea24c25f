"""What a serving benchmark measures: one request's timeline, and the figures computed from many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BLOCK_WIDTH = 50
LABEL_WIDTH = 40


@dataclass
class RequestOutput:
    """Result of one request; times in seconds, ``start`` on a clock that all requests of a run share.

    ``itl`` holds the gaps between tokens after the first chunk: a chunk of several tokens divides its gap among them.
    ``error`` is empty on success.
    """

    prompt_len: int
    start: float = 0.0
    ttft: float = 0.0
    latency: float = 0.0
    output_len: int = 0
    itl: list[float] = field(default_factory=list)
    text: str = ""
    error: str = ""

    @property
    def success(self) -> bool:
        return not self.error

    @property
    def tpot(self) -> float | None:
        """Seconds per output token after the first; None for outputs of one token."""
        return (self.latency - self.ttft) / (self.output_len - 1) if self.output_len > 1 else None

    def token_times(self) -> list[tuple[float, int]]:
        """(time, tokens received at that time): the first chunk, then one entry per gap."""
        now = self.start + self.ttft
        times = [(now, max(0, self.output_len - len(self.itl)))]
        for gap in self.itl:
            now += gap
            times.append((now, 1))
        return times


@dataclass(frozen=True)
class Distribution:
    """Milliseconds over the requests (or gaps) of a run; all zero when there were none."""

    mean: float
    median: float
    std: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Distribution:
        """Percentiles interpolate linearly between neighbours; the deviation is the population's."""
        ms = np.asarray(seconds if len(seconds) else [0.0], dtype=np.float64) * 1e3
        p50, p90, p95, p99 = (float(value) for value in np.percentile(ms, [50, 90, 95, 99]))
        return cls(float(ms.mean()), p50, float(ms.std()), p90, p95, p99, float(ms.max()))


@dataclass(frozen=True)
class BenchmarkMetrics:
    """Figures of one run. Throughputs are per second of ``duration``; failed requests are not counted."""

    duration: float
    completed: int
    total_input: int
    total_output: int
    total_output_retokenized: int
    e2e: Distribution
    ttft: Distribution
    tpot: Distribution
    itl: Distribution
    concurrency: float  # sum of latencies / duration
    max_output_tokens_per_s: float  # of the one-second buckets counted from the first request's start
    max_concurrent_requests: int  # in flight at one moment

    def per_second(self, count: float) -> float:
        return count / self.duration if self.duration > 0 else 0.0


def calculate_metrics(
    outputs: Sequence[RequestOutput], duration: float, retokenized_lens: Sequence[int]
) -> BenchmarkMetrics:
    """Figures of a run of ``duration`` seconds; ``retokenized_lens[i]`` belongs to ``outputs[i]``."""
    done = [output for output in outputs if output.success]
    latencies = [output.latency for output in done]
    return BenchmarkMetrics(
        duration=duration,
        completed=len(done),
        total_input=sum(output.prompt_len for output in done),
        total_output=sum(output.output_len for output in done),
        total_output_retokenized=sum(n for output, n in zip(outputs, retokenized_lens, strict=True) if output.success),
        e2e=Distribution.of(latencies),
        ttft=Distribution.of([output.ttft for output in done]),
        tpot=Distribution.of([tpot for output in done if (tpot := output.tpot) is not None]),
        itl=Distribution.of([gap for output in done for gap in output.itl]),
        concurrency=sum(latencies) / duration if duration > 0 else 0.0,
        max_output_tokens_per_s=_peak_tokens_per_second(done),
        max_concurrent_requests=_peak_in_flight(done),
    )


def _peak_tokens_per_second(outputs: Sequence[RequestOutput]) -> float:
    first = min((output.start for output in outputs), default=0.0)
    buckets: dict[int, int] = {}
    for output in outputs:
        for moment, count in output.token_times():
            second = int(moment - first)
            buckets[second] = buckets.get(second, 0) + count
    return float(max(buckets.values(), default=0))


def _peak_in_flight(outputs: Sequence[RequestOutput]) -> int:
    # Ends at one moment are counted before starts: a request that replaces another one does not run at the same time.
    events = [(output.start, 1) for output in outputs] + [(output.start + output.latency, -1) for output in outputs]
    running = peak = 0
    for _, change in sorted(events):
        running += change
        peak = max(peak, running)
    return peak


@dataclass(frozen=True)
class RunInfo:
    """What the printed block and the record state about a run in addition to its figures."""

    backend: str
    dataset_name: str
    request_rate: float
    max_concurrency: int | None
    tag: str | None = None
    lengths: dict[str, Any] = field(default_factory=dict)  # the dataset's length settings, by flag name
    server_info: dict[str, Any] | None = None
    accept_length: float | None = None


def accept_length(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> float | None:
    """Tokens per verify step of a request between two readings of a server's internal states; None without speculation.

    For a server that counts no steps: the average since start that it reports (``avg_spec_accept_length``).
    """

    def since(key: str) -> int:
        return sum(state.get(key, 0) for state in after) - sum(state.get(key, 0) for state in before)

    if steps := since("spec_verify_ct"):
        return 1 + since("num_accepted_drafts") / steps
    return next((state["avg_spec_accept_length"] for state in after if "avg_spec_accept_length" in state), None)


def _figures(m: BenchmarkMetrics) -> list[tuple[str, str, float]]:
    """(label in the block, key in the record, value): upstream's, in upstream's order."""
    return [
        ("Successful requests:", "completed", m.completed),
        ("Benchmark duration (s):", "duration", m.duration),
        ("Total input tokens:", "total_input_tokens", m.total_input),
        ("Total input text tokens:", "total_input_text_tokens", m.total_input),
        ("Total generated tokens:", "total_output_tokens", m.total_output),
        ("Total generated tokens (retokenized):", "total_output_tokens_retokenized", m.total_output_retokenized),
        ("Request throughput (req/s):", "request_throughput", m.per_second(m.completed)),
        ("Input token throughput (tok/s):", "input_throughput", m.per_second(m.total_input)),
        ("Output token throughput (tok/s):", "output_throughput", m.per_second(m.total_output)),
        ("Peak output token throughput (tok/s):", "max_output_tokens_per_s", m.max_output_tokens_per_s),
        ("Peak concurrent requests:", "max_concurrent_requests", m.max_concurrent_requests),
        ("Total token throughput (tok/s):", "total_throughput", m.per_second(m.total_input + m.total_output)),
        ("Concurrency:", "concurrency", m.concurrency),
    ]


def result_block(info: RunInfo, metrics: BenchmarkMetrics) -> str:
    """The printed block."""
    m = metrics
    rows: list[tuple[str, Any]] = [
        ("Backend:", info.backend),
        ("Traffic request rate:", info.request_rate),
        ("Max request concurrency:", info.max_concurrency or "not set"),
        *((label, value) for label, _, value in _figures(m)),
    ]
    if info.accept_length:
        rows.append(("Accept length:", info.accept_length))
    lines = ["", f"{' Serving Benchmark Result ':=^{BLOCK_WIDTH}}", *(block_row(label, value) for label, value in rows)]
    sections = (
        ("End-to-End Latency", "E2E Latency", m.e2e, ("mean", "median", "p90", "p99")),
        ("Time to First Token", "TTFT", m.ttft, ("mean", "median", "p99")),
        ("Time per Output Token (excl. 1st token)", "TPOT", m.tpot, ("mean", "median", "p99")),
        ("Inter-Token Latency", "ITL", m.itl, ("mean", "median", "p95", "p99", "max")),
    )
    for title, short, values, figures in sections:
        lines.append(f"{title:-^{BLOCK_WIDTH}}")
        for figure in figures:
            name = figure.upper() if figure.startswith("p") else figure.capitalize()
            lines.append(block_row(f"{name} {short} (ms):", getattr(values, figure)))
    lines.append("=" * BLOCK_WIDTH)
    return "\n".join(lines)


def block_row(label: str, value: Any) -> str:
    """One line of a result block: the label in 40 columns, finite fractions with two digits."""
    number = isinstance(value, float) and np.isfinite(value)
    return f"{label:<{LABEL_WIDTH}} " + (f"{value:<10.2f}" if number else f"{value!s:<10}")


def result_record(info: RunInfo, metrics: BenchmarkMetrics) -> dict[str, Any]:
    """One JSONL record under upstream's keys; an unlimited request rate is the text "inf", as JSON has no infinity."""
    m = metrics
    record: dict[str, Any] = {
        "tag": info.tag,
        "backend": info.backend,
        "dataset_name": info.dataset_name,
        "request_rate": info.request_rate if np.isfinite(info.request_rate) else "inf",
        "max_concurrency": info.max_concurrency,
        **info.lengths,
        "server_info": info.server_info,
        "accept_length": info.accept_length,
        **{key: value for _, key, value in _figures(m)},
    }
    for name, values in (("e2e_latency", m.e2e), ("ttft", m.ttft), ("tpot", m.tpot), ("itl", m.itl)):
        for figure in ("mean", "median", "std", "p99"):
            record[f"{figure}_{name}_ms"] = getattr(values, figure)
    record["p90_e2e_latency_ms"] = m.e2e.p90
    record["p95_itl_ms"] = m.itl.p95
    record["max_itl_ms"] = m.itl.max
    return record


def result_details(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """What ``--output-details`` adds: one entry per request, failed ones included."""
    return {
        "input_lens": [output.prompt_len for output in outputs],
        "output_lens": [output.output_len for output in outputs],
        "ttfts": [output.ttft for output in outputs],
        "itls": [output.itl for output in outputs],
        "generated_texts": [output.text for output in outputs],
        "errors": [output.error for output in outputs],
    }

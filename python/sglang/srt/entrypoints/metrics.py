"""``/metrics``: counts and times of all processes in Prometheus' text format, under upstream's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sglang.srt.entrypoints import server_info
from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.managers.request_metrics import Histogram
from sglang.srt.managers.scheduler_metrics import token_usage

# Name in upstream's dashboards (of a counter without its _total), type, help, and the key of the scheduler's state.
_METRICS = (
    ("num_running_reqs", "gauge", "Running requests.", "num_running_reqs"),
    ("num_queue_reqs", "gauge", "Waiting requests.", "num_queue_reqs"),
    (
        "num_grammar_queue_reqs",
        "gauge",
        "Requests that wait for their grammar to be compiled.",
        "num_grammar_queue_reqs",
    ),
    ("num_used_tokens", "gauge", "Tokens of the KV pool that requests hold.", "num_used_tokens"),
    ("max_total_num_tokens", "gauge", "Size of the KV pool in tokens.", "max_total_num_tokens"),
    ("token_usage", "gauge", "Fraction of the KV pool that requests hold.", "token_usage"),
    ("full_token_usage", "gauge", "The same, if a sliding window has separate pools.", "full_token_usage"),
    ("swa_token_usage", "gauge", "Fraction of the pools of the sliding window that requests hold.", "swa_token_usage"),
    ("cache_hit_rate", "gauge", "Fraction of the last prefill step's tokens that were cached.", "cache_hit_rate"),
    ("gen_throughput", "gauge", "Generated tokens per second, as last logged.", "last_gen_throughput"),
    ("num_retracted_reqs", "gauge", "Requests retracted since start.", "num_retracted_reqs"),
    ("num_aborted_requests", "counter", "Requests aborted since start.", "num_aborted_reqs"),
    (
        "prompt_tokens",
        "counter",
        "Prompt tokens of requests started since start-up, including cached ones.",
        "num_prompt_tokens",
    ),
    ("cached_tokens", "counter", "Prompt tokens found in the prefix cache since start.", "num_cached_tokens"),
    ("generation_tokens", "counter", "Tokens generated since start.", "num_generated_tokens"),
    ("spec_accept_length", "gauge", "Tokens per verify step of a request, as last logged.", "spec_accept_length"),
    ("spec_accept_rate", "gauge", "Fraction of draft tokens that became output, as last logged.", "spec_accept_rate"),
    ("spec_draft_tokens", "counter", "Draft tokens since start.", "num_drafts"),
    ("spec_accepted_tokens", "counter", "Draft tokens that became output since start.", "num_accepted_drafts"),
)

# The same of the HTTP process; keys of ``server_info.front``.
_FRONT_METRICS = (
    ("num_refused_requests", "counter", "Calls refused since start because the queue is full.", "num_refused"),
    ("num_timed_out_requests", "counter", "Calls ended at their time limit since start.", "num_timed_out"),
)

# The same of the exchange of tokens between experts; keys of RecvStats.snapshot.
_RECV_METRICS = (
    ("moe_recv_rows", "gauge", "Most rows received in one dispatch since the last reading.", "live"),
    ("moe_recv_rows_peak", "gauge", "Most rows received in one dispatch since start.", "peak"),
    ("moe_recv_rows_bound", "gauge", "Upper bound of the rows of one dispatch since start.", "bound"),
    ("moe_recv_buffer_rows", "gauge", "Rows of the receive buffer.", "buffer"),
    ("moe_recv_suggested_cap", "gauge", "Smallest receive cap without a second round so far.", "suggested_cap"),
    ("moe_rounds_max", "gauge", "Most rounds in one step since start.", "most_rounds"),
    ("moe_input_limit_raised", "counter", "Input limits raised to the rows that can arrive.", "input_limit_raised"),
)


# Of RequestMetrics: its count, and the name, help and attribute of each of its histograms.
_NUM_REQUESTS = ("num_requests", "counter", "Requests finished since start.", "num_requests")
_HISTOGRAMS = (
    ("time_to_first_token_seconds", "Time from tokenization of a request to its first output token.", "first_token"),
    ("inter_token_latency_seconds", "Time between output tokens.", "inter_token"),
    ("e2e_request_latency_seconds", "Time from tokenization of a request to its end.", "end_to_end"),
    ("queue_time_seconds", "Time from tokenization of a request to its first step.", "queue"),
)
_FAMILIES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}


_POSITIONS = (
    "spec_accept_rate_by_position",
    "gauge",
    "Fraction of the verify steps in which the draft at this position became output, as last logged.",
)
_OVERLAP = ("stream_overlap_share", "gauge", "Fraction of a side computation's time that overlaps the main one.")


def described() -> list[tuple[str, str, str]]:
    """Name as it stands on the page, type and help of every metric that a server may show."""
    tables = [row[:3] for table in (_METRICS, _FRONT_METRICS, (_NUM_REQUESTS,), _RECV_METRICS) for row in table]
    rows = [*tables, _POSITIONS, _OVERLAP, *((name, "histogram", text) for name, text, _ in _HISTOGRAMS)]
    return [(f"sglang:{name}{'_total' if kind == 'counter' else ''}", kind, text) for name, kind, text in rows]


async def metrics_page(context: ServerContext) -> bytes:
    """The page; ``dp_rank`` tells several schedulers apart.

    It is in Prometheus' own text format whatever a client prefers: OpenMetrics allows no colon in names.
    """
    states = await context.manager.get_internal_states()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(context, states))
    return generate_latest(registry)


class _Page(Collector):
    """What the schedulers said at one time, and what this process counts."""

    def __init__(self, context: ServerContext, states: Sequence[Mapping[str, Any]]) -> None:
        self._context = context
        self._states = states

    def collect(self) -> Iterator[Metric]:
        states = self._states
        used = [{**state, **token_usage(state)} for state in states]
        received = [state.get("experts", {}).get("received_rows", {}) for state in states]
        yield from self._table(_METRICS, used)
        yield from self._table(_FRONT_METRICS, [server_info.front(self._context)])
        yield from self._table(_RECV_METRICS, received)
        yield from self._positions()
        yield from self._overlap()
        yield from self._requests()

    def _labels(self, dp_rank: int) -> dict[str, str]:
        labels = {"model_name": self._context.served_model_name, "engine_type": "unified", "tp_rank": "0"}
        return labels | ({"dp_rank": str(dp_rank)} if len(self._states) > 1 else {})

    def _family(
        self, kind: str, name: str, text: str, rows: Iterable[tuple[int, dict[str, str], float]]
    ) -> Iterator[Metric]:
        """One metric of rows (DP rank, further labels, value); nothing where there are none."""
        family = None
        for dp_rank, more, value in rows:
            labels = self._labels(dp_rank) | more
            family = family or _FAMILIES[kind](f"sglang:{name}", text, labels=list(labels))
            family.add_metric(list(labels.values()), value)
        if family is not None:
            yield family

    def _table(self, metrics: Sequence[tuple[str, ...]], states: Sequence[Mapping[str, Any]]) -> Iterator[Metric]:
        """Every metric whose key the first DP rank has, with one value per rank."""
        for name, kind, text, key in metrics:
            if key in states[0]:
                yield from self._family(kind, name, text, ((rank, {}, state[key]) for rank, state in enumerate(states)))

    def _positions(self) -> Iterator[Metric]:
        """The part of the verify steps in which the first, second, ... draft became output; none without drafts."""
        rows = (
            (dp_rank, {"position": str(position)}, rate)
            for dp_rank, state in enumerate(self._states)
            for position, rate in enumerate(state.get("spec_accept_rate_by_position", ()), start=1)
        )
        yield from self._family(_POSITIONS[1], _POSITIONS[0], _POSITIONS[2], rows)

    def _overlap(self) -> Iterator[Metric]:
        """What SGLANG_TRACE_OVERLAP measured on the first rank; nothing when it is off."""
        rows = (
            (
                0,
                {**{key: str(row[key]) for key in ("site", "num_tokens")}, "captured": str(row["captured"]).lower()},
                row["overlap_fraction"],
            )
            for row in self._states[0].get("streams", {}).get("trace", [])
        )
        yield from self._family(_OVERLAP[1], _OVERLAP[0], _OVERLAP[2], rows)

    def _requests(self) -> Iterator[Metric]:
        """What this process measured of requests."""
        ranks = self._context.manager.request_metrics
        ended = [{"num_requests": metrics.num_requests} for metrics in ranks]
        yield from self._table((_NUM_REQUESTS,), ended)
        for name, text, attribute in _HISTOGRAMS:
            family = HistogramMetricFamily(f"sglang:{name}", text, labels=list(self._labels(0)))
            for rank, metrics in enumerate(ranks):
                histogram: Histogram = getattr(metrics, attribute)
                family.add_metric(list(self._labels(rank).values()), histogram.cumulative(), histogram.sum)
            yield family

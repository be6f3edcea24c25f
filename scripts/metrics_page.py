"""The documentation page of ``/metrics``: name, type and help of every metric."""

from __future__ import annotations

from sglang.srt.entrypoints.metrics import described

_HEAD = """# Metrics

This page is generated from `python/sglang/srt/entrypoints/metrics.py` by `scripts/gen_docs.py`. `--enable-metrics`
serves them at `/metrics` in Prometheus' text format 0.0.4; [HTTP API](../references/http_api.md#metrics) says what they
count. [grafana.json](grafana.json) is a board for Grafana: import it, and choose the Prometheus that scrapes the
server.

Every metric has the labels `model_name`, `engine_type` and `tp_rank`, and `dp_rank` where there are several schedulers.
Those of speculation, of experts over several ranks and of overlapped streams are there where these are.

| Metric | Type | |
| --- | --- | --- |"""


def render() -> str:
    return "\n".join([_HEAD, *(f"| `{name}` | {kind} | {text} |" for name, kind, text in described())]) + "\n"

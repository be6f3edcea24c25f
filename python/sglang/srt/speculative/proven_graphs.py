"""Capture of the steps of speculation, and the check that a replay equals the eager step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sglang.srt.model_executor.bucket_graphs import Body, BucketGraphs
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch, StepKind
from sglang.srt.model_executor.graph_check import GraphCheck
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.platforms import current_platform

BodyOf = Callable[[int], Body[Any]]


def capture_proven(
    runner: ModelRunner, graphs: BucketGraphs[Any], body_of: BodyOf, prove: Callable[[BucketGraphs[Any], BodyOf], None]
) -> None:
    """Capture and check every bucket, and add ``graphs`` to ``runner``; its pools must be empty, and remain empty."""
    graphs.capture_all(body_of, current_platform.create_graph)
    prove(graphs, body_of)
    runner.draft_graphs[graphs.name] = graphs


def prove_replay(
    runner: ModelRunner,
    graphs: BucketGraphs[Any],
    kind: StepKind,
    body_of: BodyOf,
    fill: Callable[[ModelWorkerBatch, int], None],
    more: tuple[torch.Tensor, ...] = (),
) -> None:
    """Refuse each bucket whose replay differs from the eager body, at scattered locations with NaN in the padding.

    fill: writes the same inputs for the same batch and bucket. more: further tensors that must be equal after a step.
    """

    def outputs(run: Callable[[int], Any], batch: ModelWorkerBatch, bucket: int) -> tuple[torch.Tensor, ...]:
        fill(batch, bucket)
        return (*run(bucket).first(batch.batch_size).tensors(), *more)

    GraphCheck(
        graphs,
        kind,
        partial(outputs, lambda bucket: body_of(bucket)()),
        partial(outputs, graphs.run),
        runner.memory,
        runner.pools,
        runner.model_config.vocab_size,
        writes_table=False,
    ).run()

"""Capture and proof of the steps of speculation, whatever each computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from sglang.srt.model_executor.bucket_graphs import Body, BucketGraphs
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch, StepKind
from sglang.srt.model_executor.graph_check import GraphCheck
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.runner_build import advance
from sglang.srt.platforms import current_platform

BodyOf = Callable[[int], Body[Any]]


def capture_proven(
    runner: ModelRunner, graphs: BucketGraphs[Any], body_of: BodyOf, prove: Callable[[BucketGraphs[Any], BodyOf], None]
) -> None:
    """Record every bucket, have it proven, and give ``graphs`` to ``runner``; its pools must be empty, and stay so."""
    with tqdm(total=len(graphs.buckets), desc=f"Capturing {graphs.name} graphs", unit="graph") as bar:
        graphs.capture_all(body_of, current_platform.create_graph, partial(advance, bar))
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
    """Refuse each bucket whose replay is not what its body does, on scattered slots with poisoned padding.

    fill: lays out the same inputs for the same batch and bucket. more: tensors that a step must leave alike too.
    """

    def outputs(run: Callable[[int], Any], batch: ModelWorkerBatch, bucket: int) -> tuple[torch.Tensor, ...]:
        fill(batch, bucket)
        return (*run(bucket).first(batch.batch_size).tensors(), *more)

    GraphCheck(
        graphs,
        kind,
        partial(outputs, lambda bucket: body_of(bucket)()),
        partial(outputs, graphs.run),
        runner.last_token,
        runner.req_to_token_pool,
        runner.pools,
        runner.model_config.vocab_size,
        runner.relay,
        writes_table=False,
        window=runner.memory.window,
    ).run()

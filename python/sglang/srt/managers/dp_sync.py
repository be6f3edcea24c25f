"""Attention data parallelism: what the groups of a replica agree on before each step that they run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sglang.srt.distributed import ParallelState
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import DECODE, ModelWorkerBatch, StepKind

# Buckets that groups plan for: one without rows takes any, one with prompts or more rows than any bucket takes none.
ANY_BUCKET, NO_BUCKET = 0, -1


@dataclass(frozen=True)
class DpStep:
    """The step as all ranks see it.

    ``num_tokens`` and ``num_requests`` are those of each attention group. All run the decode graph of ``bucket``
    requests, or all run eagerly (None); ``replays_chains`` is False when some group's drafts are drawn as no graph
    draws them. ``has_work`` is False when nobody has anything to do, now or left over. ``stops`` ends all loops.
    """

    num_tokens: list[int]
    num_requests: list[int]
    bucket: int | None
    replays_chains: bool
    has_work: bool
    stops: bool

    @property
    def runs(self) -> bool:
        """True when some group brings tokens, so that every group takes part in a forward."""
        return any(self.num_tokens)

    def of_batch(self, batch: ModelWorkerBatch) -> ModelWorkerBatch:
        """``batch`` with what was agreed on."""
        return replace(
            batch,
            global_num_tokens=self.num_tokens,
            graph_bucket=self.bucket,
            global_num_requests=self.num_requests,
            replays_chains=self.replays_chains,
        )

    def idle_batch(self, kind: StepKind = DECODE) -> ModelWorkerBatch:
        """The part of a group that brings nothing; kind: of the steps by which requests go on."""
        return self.of_batch(ModelWorkerBatch.idle(kind))


def agree(local_plans: Sequence[Sequence[int]], group_size: int) -> DpStep:
    """The step that follows from each rank's (tokens, requests, bucket, edits, has work, stops), in rank order.

    Every rank computes it from the same rows. Raises RuntimeError when ranks of one attention group, which decide from
    the same messages, do not bring the same.
    """
    groups = [list(plan) for plan in local_plans[::group_size]]
    for rank, plan in enumerate(local_plans):
        if list(plan) != groups[rank // group_size]:
            raise RuntimeError(
                f"ranks {rank // group_size * group_size} and {rank} share their requests and plan different steps "
                f"(tokens, requests, bucket, edits, work, stop): {groups[rank // group_size]} and {list(plan)}"
            )
    tokens, requests, buckets, edits, work, stops = (list(column) for column in zip(*groups, strict=True))
    bucket = max(buckets) if min(buckets) != NO_BUCKET and any(tokens) else None
    return DpStep(tokens, requests, bucket, not any(edits), any(work), any(stops))


class DpStepSync:
    """One exchange per step over the host between all ranks of a replica.

    ``bucket_of(rows)`` is the decode graph that takes so many rows, None without one; it is the same on every rank.
    """

    def __init__(self, state: ParallelState, bucket_of: Callable[[int], int | None]) -> None:
        self._world = state.world
        self._group_size = state.tp.size
        self._bucket_of = bucket_of

    def exchange(self, batch: ScheduleBatch | None, has_work: bool, stops: bool) -> DpStep:
        """Tell what this rank brings, and learn what all do; waits for the slowest."""
        tokens, requests, bucket, edits = 0, 0, ANY_BUCKET, False
        if batch is not None:
            tokens, requests = batch.num_tokens, len(batch.reqs)
            bucket = (self._bucket_of(requests) if batch.forward_mode.is_decode() else None) or NO_BUCKET
            edits = batch.kind != DECODE and any(req.edits_logits for req in batch.reqs)
        plan = (tokens, requests, bucket, int(edits), int(has_work), int(stops))
        return agree(self._world.all_gather_ints(plan), self._group_size)

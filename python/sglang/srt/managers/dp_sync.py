"""Attention data parallelism: how the groups of a replica agree on each step that they run together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sglang.srt.distributed.parallel_state import ParallelState
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import DECODE, ModelWorkerBatch

# Buckets in a plan: a group without rows accepts any; with prompts, or more rows than the largest bucket, none fits.
ANY_BUCKET, NO_BUCKET = 0, -1


@dataclass(frozen=True)
class DpStep:
    """The step that all ranks agreed on.

    ``num_tokens`` and ``num_requests`` are those of each attention group. All groups replay the decode graph of
    ``bucket`` requests, or all run eagerly (None). ``replays_chains`` is False if the drafts of a group cannot be made
    by a graph. ``has_work`` is False if no group has work left. ``stops`` ends the loops of all ranks.
    """

    num_tokens: list[int]
    num_requests: list[int]
    bucket: int | None
    replays_chains: bool
    has_work: bool
    stops: bool

    @property
    def runs(self) -> bool:
        """True when a group has tokens, so that every group runs a forward."""
        return any(self.num_tokens)

    def of_batch(self, batch: ModelWorkerBatch) -> ModelWorkerBatch:
        """``batch`` with the fields of this step."""
        return replace(
            batch,
            global_num_tokens=self.num_tokens,
            graph_bucket=self.bucket,
            global_num_requests=self.num_requests,
            replays_chains=self.replays_chains,
        )


def agree(local_plans: Sequence[Sequence[int]], group_size: int) -> DpStep:
    """The step that follows from each rank's (tokens, requests, bucket, edits, has work, stops), in rank order.

    Every rank computes it from the same rows. Raises RuntimeError if ranks of one attention group, which decide from
    the same messages, have different plans.
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
    """One exchange per step, over the host, of a replica's ranks; ``bucket_of(rows)``: the decode graph, if any."""

    def __init__(self, state: ParallelState, bucket_of: Callable[[int], int | None]) -> None:
        self._world = state.world
        self._group_size = state.tp.size
        self._bucket_of = bucket_of

    def exchange(self, batch: ScheduleBatch | None, has_work: bool, stops: bool) -> DpStep:
        """Send this rank's plan and receive those of all ranks; waits for the slowest."""
        tokens, requests, bucket, edits = 0, 0, ANY_BUCKET, False
        if batch is not None:
            tokens, requests = batch.num_tokens, len(batch.reqs)
            bucket = (self._bucket_of(requests) if batch.forward_mode.is_decode() else None) or NO_BUCKET
            edits = batch.kind != DECODE and any(req.edits_logits for req in batch.reqs)
        plan = (tokens, requests, bucket, int(edits), int(has_work), int(stops))
        return agree(self._world.all_gather_ints(plan), self._group_size)

"""The draft's captured steps: the layer over a verify step's rows, and the chain of draft steps after it as one graph.

Both read lengths and cache locations from device memory, where the number of accepted tokens is known first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from sglang.srt.distributed.parallel_state import get_parallel_state, get_world_group
from sglang.srt.model_executor.bucket_graphs import Body, BucketGraphs
from sglang.srt.model_executor.capture_lint import HostList
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode, ModelWorkerBatch
from sglang.srt.model_executor.model_runner import ModelRunner, StepForward, place_rows
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.mtp_drafter import ChainStart, Drafts, MtpDrafter
from sglang.srt.speculative.proven_graphs import BodyOf, capture_proven, prove_replay
from sglang.srt.speculative.spec_buffers import SpecBuffers
from sglang.srt.speculative.spec_info import SpecInfo
from sglang.srt.speculative.verify import Accepted

EXTEND, GREEDY, SAMPLED = "draft extend", "greedy draft", "sampled draft"


class DraftGraphs:
    """Captures, checks and replays the steps of ``drafter``, whose target model runs in ``runner``.

    One graph of a chain is for batches whose rows are all greedy, one for all others. A batch with penalties, biases
    or a mask drafts eagerly: their inputs have no fixed size.
    """

    def __init__(self, drafter: MtpDrafter, runner: ModelRunner, spec: SpecInfo, buckets: Sequence[int]) -> None:
        assert runner.relay is not None
        self._drafter = drafter
        self._runner = runner
        self._spec = spec
        self._relay = runner.relay
        # The chain starts written by the last replayed extend step, and its bucket.
        self._begun: tuple[ChainStart | None, int | None] = (None, None)
        self._num_groups = get_parallel_state().attn_dp_size
        self.buffers = SpecBuffers(buckets[-1], spec, runner)
        world = get_world_group()
        self.extend_graphs: BucketGraphs[ChainStart] = BucketGraphs(EXTEND, buckets, runner.device, world)
        self.chains: dict[str, BucketGraphs[Drafts]] = {
            name: BucketGraphs(name, buckets, runner.device, world) for name in (GREEDY, SAMPLED)
        }

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture and check every bucket; the pools must be empty, and remain empty."""
        capture_proven(self._runner, self.extend_graphs, self.extend_body, self.prove)
        for name, graphs in self.chains.items():
            capture_proven(self._runner, graphs, partial(self.chain_body, name == GREEDY), self.prove)

    def prove(self, graphs: BucketGraphs[Any], body_of: BodyOf) -> None:
        """Refuse each bucket whose replay differs from the eager body, at scattered locations, with NaN as padding."""
        prove_replay(self._runner, graphs, self._spec.verify, body_of, self._fill_at_random)

    def extend_body(self, bucket: int) -> Body[ChainStart]:
        """The layer over all rows of a verify step; a chain starts at the last accepted row."""
        buffers, drafter, width = self.buffers, self._drafter, self._spec.num_draft_tokens

        def body() -> ChainStart:
            forward_batch = replace(
                buffers.step.view(bucket, drafter.extend_backend, False, None),
                forward_mode=ForwardMode.DRAFT_EXTEND,
                input_ids=buffers.sampled[:bucket].flatten(),
                seq_lens_cpu=HostList(),
                logits_rows=buffers.row_before[:bucket] + buffers.num_new[:bucket],
                wants_hidden=True,
            )
            begun = drafter.begin(forward_batch, buffers.step_hidden[: bucket * width])
            start = buffers.start(bucket)
            for ours, theirs in zip(start.tensors(), begun.tensors(), strict=True):
                ours.copy_(theirs)
            return start

        return body

    def chain_body(self, greedy: bool, bucket: int) -> Body[Drafts]:
        """All draft tokens of a step."""
        buffers = self.buffers
        info, start = buffers.sampling_info(bucket, greedy), buffers.start(bucket)
        # In a captured step every attention group has the same number of rows.
        groups = [bucket] * self._num_groups if self._num_groups > 1 else None
        return lambda: self._drafter.go_on(buffers.rows[:bucket], start, info, buffers.step.num_requests, None, groups)

    def _bucket_of(self, step: StepForward, *graphs: BucketGraphs[Any]) -> int | None:
        """The bucket of ``graphs`` to replay after ``step``; None for an eager run.

        Attention groups either all use the bucket of the step, or all run eagerly.
        """
        if step.batch.global_num_tokens is None:
            return graphs[0].bucket_of(step.batch_size)
        agreed = step.batch.graph_bucket
        return agreed if agreed is not None and all(each.bucket_of(agreed) == agreed for each in graphs) else None

    def extend(self, step: StepForward, accepted: Accepted) -> ChainStart | None:
        """Where chains start after a verify step, by a graph; None if that must run eagerly."""
        bucket = self._bucket_of(step, self.extend_graphs)
        if bucket is None:
            return None
        if accepted.bucket != bucket:
            assert step.output.hidden_states is not None
            self.buffers.fill_rows(step.req_rows, bucket)
            self.buffers.fill_step(accepted, step.forward_batch, step.output.hidden_states, bucket)
        start = self.extend_graphs.run(bucket).first(step.batch_size)
        self._begun = start, bucket
        return start

    def go_on(
        self, step: StepForward, rows: torch.Tensor, start: ChainStart, info: SamplingBatchInfo
    ) -> torch.Tensor | None:
        """The draft tokens [B, n] of request rows ``rows`` [B], by a graph; None if they must be made eagerly."""
        size = rows.shape[0]
        graphs = self.chains[GREEDY if info.is_all_greedy else SAMPLED]
        edits = info.edits is not None
        if step.batch.global_num_tokens is None:
            bucket = None if edits else graphs.bucket_of(size)
        else:
            # Groups may replay different graphs (greedy or sampled), but all must replay one.
            bucket = self._bucket_of(step, *self.chains.values()) if step.batch.replays_chains else None
            assert bucket is None or not edits, "logit edits, which the other attention groups do not know of"
        if bucket is None:
            return None
        if self._begun[0] is not start or self._begun[1] != bucket:
            self.buffers.fill_rows(rows, bucket)
            self.buffers.fill_chain(start, bucket)
        if not info.is_all_greedy:
            self.buffers.fill_sampling(info)
        return graphs.run(bucket).first(size).ids

    def _fill_at_random(self, batch: ModelWorkerBatch, bucket: int) -> None:
        """Write inputs, the same for the same bucket, for the requests of ``batch``."""
        generator = torch.Generator().manual_seed(bucket)
        buffers, device, size = self.buffers, self._runner.device, batch.batch_size
        width, vocab = self._spec.num_draft_tokens, buffers.vocab_size

        def integers(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=generator).to(device)

        def normal(like: torch.Tensor, num_rows: int) -> torch.Tensor:
            return torch.randn(num_rows, like.shape[1], generator=generator).to(device, like.dtype)

        for rest in (buffers.step_hidden, buffers.hidden, buffers.logits):  # left by an earlier step where padding is
            rest.fill_(math.nan)
        placed = ForwardBatch.from_worker_batch(batch, device, None)
        place_rows(placed, self._relay, self._runner.req_to_token_pool)
        accepted = Accepted(integers(0, vocab, size, width), integers(1, width + 1, size))
        accepted.num_new[0] = width  # the first row is also that of an index that was never written
        at = placed.positions.view(accepted.sampled.shape)[:, 0]  # not what the extend step writes
        start = ChainStart(normal(buffers.logits, size), normal(buffers.hidden, size), at)
        buffers.fill_rows(placed.req_pool_indices, bucket)
        buffers.fill_step(accepted, placed, normal(buffers.step_hidden, size * width), bucket)
        buffers.fill_chain(start, bucket)
        buffers.fill_sampling_at_random(size, generator)

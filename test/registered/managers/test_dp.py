"""Attention groups: what they agree on, that they always step together, and which of them gets a request."""

from __future__ import annotations

import random
import threading
import unittest
from dataclasses import replace
from typing import Any

import torch

from sglang.srt.distributed.parallel_state import ParallelState, ProcessGroupHandle
from sglang.srt.managers.dp_routing import LoadBalancer
from sglang.srt.managers.dp_sync import ANY_BUCKET, NO_BUCKET, DpStepSync, agree
from sglang.srt.managers.io_struct import AbortReq, ShutdownReq
from sglang.srt.managers.process_launch import LaunchError, _check_devices, rank_places
from sglang.srt.model_executor.forward_batch_info import DECODE, ForwardMode, ModelWorkerBatch, StepKind
from sglang.srt.server_args import ServerArgs
from sglang.test import scheduler_fakes as fakes
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase
from sglang.test.thread_ranks import Meeting

register_cpu_ci(est_time=4, suite="stage-a-test-cpu")

VERIFY = StepKind("verify", 4)


class TestAgree(CustomTestCase):
    def test_bucket(self) -> None:
        for buckets, wanted in (
            ([4, 8], 8), ([4, ANY_BUCKET], 4), ([4, NO_BUCKET], None), ([ANY_BUCKET, NO_BUCKET], None), ([8, 8], 8),
        ):  # fmt: skip
            counts = [0 if bucket == ANY_BUCKET else 3 for bucket in buckets]
            rows = [(count, count, bucket, 0, 1, 0) for count, bucket in zip(counts, buckets, strict=True)]
            self.assertEqual(agree(rows, 1).bucket, wanted, buckets)

    def test_idle_work_and_stop(self) -> None:
        step = agree([(0, 0, ANY_BUCKET, 0, 0, 0)] * 2, 1)
        self.assertEqual((step.runs, step.has_work, step.stops, step.bucket), (False, False, False, None))
        step = agree([(0, 0, ANY_BUCKET, 0, 1, 0), (0, 0, ANY_BUCKET, 0, 0, 1)], 1)
        self.assertEqual((step.runs, step.has_work, step.stops), (False, True, True))

    def test_drafts(self) -> None:
        """A draft step has a row per request, and no graph samples from edited logits, of whichever group."""
        for edits in ((0, 0), (0, 1)):
            step = agree([(12, 3, 4, edits[0], 1, 0), (8, 2, 2, edits[1], 1, 0)], 1)
            self.assertEqual((step.num_tokens, step.num_requests, step.bucket), ([12, 8], [3, 2], 4))
            self.assertEqual(step.replays_chains, not any(edits))
            batch = step.of_batch(ModelWorkerBatch.idle(VERIFY))
            self.assertEqual(
                (batch.global_num_requests, batch.replays_chains, batch.kind), ([3, 2], not any(edits), VERIFY)
            )

    def test_ranks_of_a_group_bring_the_same(self) -> None:
        rows = [(5, 5, 8, 0, 1, 0), (5, 5, 8, 0, 1, 0), (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)]
        self.assertEqual(agree(rows, 2).num_tokens, [5, 0])
        rows[3] = (1, 1, 1, 0, 1, 0)
        with self.assertRaisesRegex(RuntimeError, "ranks 2 and 3 share their requests and plan different steps"):
            agree(rows, 2)

    def test_an_idle_group_brings_no_rows(self) -> None:
        step = agree([(7, 7, NO_BUCKET, 0, 1, 0), (0, 0, ANY_BUCKET, 0, 0, 0)], 1)
        batch = step.of_batch(ModelWorkerBatch.idle(DECODE))
        self.assertEqual((batch.forward_mode, batch.batch_size), (ForwardMode.IDLE, 0))
        self.assertEqual((batch.global_num_tokens, batch.graph_bucket), ([7, 0], None))


class ThreadWorld(ProcessGroupHandle):
    """The exchange of groups that are threads."""

    meeting: Meeting

    def all_gather_ints(self, values: Any) -> list[list[int]]:
        rows: list[list[int]] = [x.tolist() for x in self.meeting.exchange(self.rank, torch.tensor(values))]
        return rows


class Group:
    """One attention group: the scheduler of ``test_scheduler`` in a thread, and what its worker was given."""

    def __init__(self, rank: int, meeting: Meeting, options: dict[str, Any]) -> None:
        options = dict(options)
        deep = options.pop("deep_pool_check", True)
        self.setup = fakes.make(**options)
        self.rng = random.Random(rank)
        world = ThreadWorld(rank, 2)
        object.__setattr__(world, "meeting", meeting)
        self.scheduler = self.setup.scheduler
        self.scheduler.config = replace(self.scheduler.config, dp_rank=rank, dp_size=2, deep_pool_check=deep)
        # For each check of the idle pools: whether all was recounted, and whether the other group had work.
        self.checks: list[tuple[bool, bool]] = []
        check = self.setup.memory.check_idle
        self.setup.memory.check_idle = lambda deep: (
            self.checks.append((deep, not self.scheduler._all_idle)),
            check(deep),
        )[1]
        buckets = {rows: 4 if rows <= 4 else 8 for rows in range(1, 9) if rows != 5}
        self.scheduler.sync = DpStepSync(ParallelState(world, ProcessGroupHandle()), buckets.get)
        self.rank = rank
        self.seen: list[tuple[list[int] | None, int | None, list[int] | None]] = []
        self.own: list[tuple[ForwardMode, int, int]] = []
        self.script: list[Any] = []
        self.num_quiet = 0
        self.peer: Group
        self.setup.channel.receive = self.receive
        worker = self.setup.worker
        forward = worker.forward
        worker.forward = lambda batch: (self.note(batch), forward(batch))[1]

    def note(self, batch: ModelWorkerBatch) -> None:
        self.seen.append((batch.global_num_tokens, batch.graph_bucket, batch.global_num_requests))
        self.own.append((batch.forward_mode, batch.positions.numel(), batch.batch_size))

    def receive(self, wait: bool) -> list[Any]:
        if self.script and (wait or self.rng.random() < 0.3):
            return [self.script.pop(0)]
        # What the peer took before the last exchange, the exchange has told.
        self.num_quiet = self.num_quiet + 1 if wait and not self.script and not self.peer.script else 0
        return [ShutdownReq()] if self.rank == 1 and self.num_quiet > 1 else []


class TestGroupsStepTogether(CustomTestCase):
    def traffic(self, seed: int, counts: tuple[int, int], first: Any = (), **options: Any) -> tuple[Group, Group]:
        """``counts`` random requests of each group; ``first`` come before those of group 0."""
        meeting, rng = Meeting(2), random.Random(seed)
        groups = [Group(rank, meeting, options) for rank in range(2)]
        groups[0].script += first
        wanted: list[dict[str, list[int]]] = [{}, {}]
        for rank, count in enumerate(counts):
            groups[rank].peer = groups[1 - rank]
            for number in range(count):
                prompt = [rng.randrange(fakes.VOCAB - 2) for _ in range(rng.choice([1, 5, 40]))]
                max_new = rng.choice([1, 2, 20])
                wanted[rank][f"r{number}"] = fakes.expected_output(prompt, max_new, 160)
                groups[rank].script.append(fakes.request(f"r{number}", prompt, max_new))
                if rng.random() < 0.2:
                    groups[rank].script.append(AbortReq(rid=f"r{number}"))
        errors: list[BaseException] = []

        def loop(group: Group) -> None:
            try:
                group.scheduler.event_loop()
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=loop, args=(group,), daemon=True) for group in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        self.assertEqual(errors, [])
        self.assertFalse(any(thread.is_alive() for thread in threads), "a group did not stop")
        for rank, group in enumerate(groups):
            group.setup.memory.check_idle(deep=True)
            for rid, tokens in wanted[rank].items():
                if group.setup.channel.reasons[rid].type != "abort":
                    self.assertEqual(group.setup.channel.outputs[rid], tokens, rid)
        return groups[0], groups[1]

    def check_steps(self, first: Group, second: Group) -> None:
        self.assertEqual(first.seen, second.seen)
        for index, (tokens, bucket, requests) in enumerate(first.seen):
            assert tokens is not None and requests is not None
            parts = [group.own[index] for group in (first, second)]
            self.assertEqual(list(zip(tokens, requests, strict=True)), [part[1:] for part in parts])
            self.assertTrue(any(tokens), "a step for nobody")
            goes_on = (ForwardMode.DECODE, ForwardMode.TARGET_VERIFY)
            fits = all(mode in goes_on and count != 5 for mode, _, count in parts if count)
            self.assertEqual(bucket, max(4 if count <= 4 else 8 for count in requests) if fits else None)

    def test_all_modes(self) -> None:
        modes: list[dict[str, Any]] = [
            {}, {"overlap": True}, {"mixed": True}, {"hybrid": True, "page": 4, "overlap": True},
            {"pool": 160, "conservativeness": 0.05, "overlap": True}, {"retract_interval": 3, "mixed": True},
            {"width": 4, "overlap": True}, {"width": 4, "pool": 160, "conservativeness": 0.05, "overlap": True},
        ]  # fmt: skip
        for mode in modes:
            for seed, counts in enumerate(((12, 12), (12, 0), (1, 20))):
                with self.subTest(mode=mode, counts=counts):
                    groups = self.traffic(seed, counts, **{"pool": 160, **mode})
                    self.check_steps(*groups)
                    idle = sum(group.scheduler.metrics.num_idle_steps for group in groups)
                    self.assertGreater(idle, 5 if 0 in counts else 0)

    def test_a_group_recounts_its_pools_only_when_no_other_waits_for_it(self) -> None:
        groups = self.traffic(7, (12, 2), deep_pool_check=False)
        checks = [check for group in groups for check in group.checks]
        self.assertIn((False, True), checks, "a group went idle while the other worked")
        self.assertNotIn((True, True), checks)

    def test_nan_in_a_chunk_ends_its_request_and_no_group(self) -> None:
        """A chunk of 16 ends in the id that makes NaN; the prompt's own end would be sound."""
        bad = [*range(8, 23), fakes.BAD, *range(8, 18)]
        for hybrid in (False, True):
            with self.subTest(hybrid=hybrid):
                first, _ = self.traffic(2, (4, 4), first=[fakes.request("bad", bad, 5)], pool=160, hybrid=hybrid)
                self.assertEqual(first.setup.channel.reasons["bad"].status_code, 500)
                self.assertEqual(first.setup.memory.tree.match_prefix(bad).kv_len, 0)

    def test_one_shutdown_ends_both(self) -> None:
        first, second = self.traffic(5, (0, 0))
        self.assertEqual((first.seen, second.seen), ([], []))


class TestRouting(CustomTestCase):
    def test_round_robin(self) -> None:
        balancer = LoadBalancer("round_robin", 3)
        self.assertEqual([balancer.assign(100) for _ in range(7)], [0, 1, 2, 0, 1, 2, 0])

    def test_total_tokens(self) -> None:
        balancer = LoadBalancer("total_tokens", 3)
        self.assertEqual([balancer.assign(size) for size in (10, 5, 7, 1, 4, 2)], [0, 1, 2, 1, 1, 2])
        balancer.release(0, 10)
        self.assertEqual(balancer.assign(9), 0)
        self.assertEqual([balancer.assign(1) for _ in range(3)], [0, 2, 0])


class TestDevices(CustomTestCase):
    def test_more_ranks_than_devices_are_refused(self) -> None:
        for ranks, devices in ((1, 1), (8, 8), (4, None)):
            _check_devices(ranks, devices)
        with self.assertRaisesRegex(LaunchError, "4 ranks .* shows 2"):
            _check_devices(4, 2)


class TestPlaces(CustomTestCase):
    def labels(self, **fields: Any) -> list[tuple[int, int, int, str]]:
        return [(p.local_rank, p.rank, p.dp_rank, p.label) for p in rank_places(ServerArgs(**fields))]

    def test_replicas_and_groups(self) -> None:
        self.assertEqual(self.labels(), [(0, 0, 0, "")])
        self.assertEqual([label for *_, label in self.labels(tp_size=2)], ["TP0", "TP1"])
        self.assertEqual(
            self.labels(tp_size=2, dp_size=2),
            [(0, 0, 0, "DP0 TP0"), (1, 1, 0, "DP0 TP1"), (2, 0, 1, "DP1 TP0"), (3, 1, 1, "DP1 TP1")],
        )
        self.assertEqual(
            self.labels(tp_size=4, dp_size=2, enable_dp_attention=True),
            [(0, 0, 0, "DP0 TP0"), (1, 1, 0, "DP0 TP1"), (2, 2, 1, "DP1 TP2"), (3, 3, 1, "DP1 TP3")],
        )


if __name__ == "__main__":
    unittest.main()

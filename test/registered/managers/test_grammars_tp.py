"""Grammars over two ranks: each compiles at its own speed, and both admit a request in the same turn."""

from __future__ import annotations

import threading
import time
import unittest
from functools import partial

import torch
import torch.distributed as dist

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.constrained.llguidance_backend import grammar_of
from sglang.srt.distributed.parallel_state import ParallelState, ProcessGroupHandle, override_parallel_state
from sglang.srt.managers.grammar_manager import GrammarManager
from sglang.srt.managers.io_struct import AbortReq, GrammarReady, ShutdownReq, TokenizedGenerateReqInput
from sglang.srt.managers.ipc import IpcNames, Sender
from sglang.srt.managers.scheduler_io import FollowerChannel, RankZeroChannel
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.process_ranks import run_processes
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=15, suite="stage-b-test-cpu")

MODEL = str(EMBEDDED_MODELS["deepseek-v3-tiny"])
FORMS = ("[a-z]{4}", None, "[0-9]{3}x", "[a-z]{4}", None, "q[^a-z]{2}")
BAD = "start: nothing"
SLOW_S = 0.3


def engine(**settings):
    options = {"max_total_tokens": 512, "max_running_requests": 4, "random_seed": 1, "dtype": "float32"}
    return EngineHarness(MODEL, with_tokenizer=True, **{**options, **settings})


def requests():
    """Greedy requests, with grammars and without."""
    for number, form in enumerate(FORMS):
        grammar = None if form is None else grammar_of("regex", form, {})
        params = SamplingParams(max_new_tokens=8, temperature=0.0)
        yield TokenizedGenerateReqInput(
            rid=f"r{number}", input_ids=[50 + number, 60, 70], sampling_params=params, grammar=grammar
        )


class Talk(RankZeroChannel):
    """Rank 0's channel, which keeps the replies."""

    def __init__(self, names, group, harness):
        super().__init__(names, group)
        self.to_detokenizer, self.to_tokenizer = harness.to_detokenizer, harness.to_tokenizer


class TestTwoRanks(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        torch.set_num_threads(1)
        single = engine()
        single.inbox += requests()
        cls.wanted = {rid: result.output_ids for rid, result in single.run().items()}

    def serve(self, rank, slow_rank=None):
        """Serve on one of two ranks, of which one compiles slowly; rank 0 also plays the clients."""
        handle = ProcessGroupHandle(rank, 2, dist.group.WORLD, dist.group.WORLD)
        with override_parallel_state(ParallelState(handle, handle)):
            harness = engine(tp_size=2)
            scheduler, taken = harness.scheduler, []
            announce = lambda rid: None  # noqa: E731
            if rank == 0:
                names = IpcNames.create()
                inbox = Sender(names.schedulers[0])
                announce = lambda rid: inbox.send(GrammarReady(rid=rid))  # noqa: E731
                scheduler.channel = Talk(names, handle, harness)
            else:
                scheduler.channel = FollowerChannel(handle)
                scheduler.channel.to_detokenizer = harness.to_detokenizer
            backend = scheduler.grammars._backend
            compile_now = backend.compile

            def compile_in_time(grammar):
                if rank == slow_rank:
                    time.sleep(SLOW_S)
                return compile_now(grammar)

            backend.compile = compile_in_time
            scheduler.grammars = GrammarManager(backend, announce)
            take = scheduler.grammars.take
            scheduler.grammars.take = lambda rid: (taken.append((rid, scheduler.metrics.num_decode_steps)), take(rid))[
                1
            ]
            if rank == 0:
                client = threading.Thread(target=self.play_clients, args=(names, harness))
                client.start()
            scheduler.event_loop()
            if rank == 0:
                client.join()
                names.remove()
        results = harness.results
        found = {rid: results[rid].output_ids for rid in self.wanted}
        assert found == self.wanted, (rank, found, self.wanted)
        assert results["bad"].finish_reason.status_code == 400, results["bad"].finish_reason
        assert results["gone"].finish_reason.type == "abort" and not results["gone"].output_ids
        told = dist_gather(taken)
        assert told[0] == told[1] and len(taken) == 6, told

    @staticmethod
    def play_clients(names, harness):
        clients = Sender(names.schedulers[0])
        bad = TokenizedGenerateReqInput(rid="bad", input_ids=[5], sampling_params=SamplingParams(), grammar=BAD)
        gone = TokenizedGenerateReqInput(
            rid="gone", input_ids=[5], sampling_params=SamplingParams(), grammar=grammar_of("regex", "abc", {})
        )
        clients.send(*requests(), bad, gone, AbortReq(rid="gone"))
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            reasons = [result.finish_reason for result in list(harness.results.values())]
            if len(reasons) == len(FORMS) + 2 and None not in reasons:
                break
            time.sleep(0.05)
        time.sleep(3 * SLOW_S)  # what is still to be compiled for a request that has gone
        clients.send(ShutdownReq())
        clients.close()

    def test_whoever_is_slower(self):
        for slow_rank in (None, 0, 1):
            with self.subTest(slow_rank=slow_rank):
                run_processes(2, partial(self.serve, slow_rank=slow_rank))


def dist_gather(value):
    """``value`` of each rank, in order."""
    values = [None, None]
    dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    unittest.main()

"""Results of a step: several tokens per request, cut where a request ends."""

from __future__ import annotations

import itertools
import random
import unittest

import torch

from sglang.srt.layers.logits_processor import RowFault
from sglang.srt.layers.logprobs import HostLogprobs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.tp_worker import StepOutput
from sglang.srt.model_executor.forward_batch_info import ModelWorkerBatch, pack, unpacked
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.scheduler_fakes import VOCAB, FakeForward, Setup, expected_output, make, request
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=2, suite="stage-a-test-cpu")


class TestSeveralTokens(CustomTestCase):
    """A decode step that gives up to ``width`` tokens per request: the outputs are those of one token per step."""

    PROMPT = [8, 9, 10, 11]

    def setup_wide(self, output: list[list[int]], faults: list[list[int]], **fields: object) -> Setup:
        """One request, whose prompt gives one token and whose next step gives ``output`` with ``faults``."""
        setup = make(width=4, chunk=None)
        message = request("a", self.PROMPT, 30, stream=True)
        for name, value in fields.items():
            setattr(message if hasattr(message, name) else message.sampling_params, name, value)
        setup.channel.inbox.append(message)
        setup.turn()
        forward = setup.worker.forward

        def scripted(batch: ModelWorkerBatch) -> FakeForward:
            step = forward(batch)
            scores = HostLogprobs([-1.0 - row for row in range(4)], [], [])
            step.output = StepOutput(output, faults, 4, scores)
            return step

        setup.worker.forward = scripted  # type: ignore[method-assign]
        return setup

    def test_every_count_comes(self) -> None:
        for overlap in (False, True):
            with self.subTest(overlap=overlap):
                self.check_every_count(overlap)

    def check_every_count(self, overlap: bool) -> None:
        setup = make(width=4, chunk=None, overlap=overlap)
        for number in range(4):
            setup.channel.inbox.append(request(f"r{number}", [8 + number] * 5, 60))
        setup.run()
        for number in range(4):
            self.assertEqual(setup.channel.outputs[f"r{number}"], expected_output([8 + number] * 5, 60, 253))
        self.assertEqual(sorted(setup.worker.num_of_counts), [1, 2, 3, 4])
        self.assertEqual(setup.worker.num_behind > 0, overlap)
        tokens = sum(count * number for count, number in setup.worker.num_of_counts.items())
        self.assertLess(setup.worker.num_steps, tokens)

    def test_overlap_under_random_traffic(self) -> None:
        """Requests that end inside a step, are aborted, or are retracted while the next step is in flight."""
        for options in (
            {},
            {"retract_interval": 3},
            {"pool": 64, "conservativeness": 0.01, "radix": False},
            {"page": 4},
        ):
            with self.subTest(options):
                setup = make(width=4, overlap=True, **options)
                rng, prompts = random.Random(4), {}
                for number in range(30):
                    prompt = [rng.randrange(VOCAB - 2) for _ in range(rng.choice([2, 9, 30]))]
                    prompts[f"r{number}"] = prompt
                    setup.channel.inbox.append(request(f"r{number}", prompt, rng.choice([1, 2, 15, 40])))
                    for _ in range(rng.randrange(4)):
                        setup.turn()
                    if number % 7 == 6:
                        setup.channel.inbox.append(AbortReq(rid=f"r{number - 1}"))
                setup.run()
                for rid, prompt in prompts.items():
                    found = setup.channel.outputs[rid]
                    wanted = expected_output(prompt, 40, 253)
                    self.assertEqual(found, wanted[: len(found)], rid)
                reasons = [reason.type for reason in setup.channel.reasons.values()]
                self.assertTrue({"abort", "stop", "length"} <= set(reasons), reasons)
                self.assertGreater(setup.worker.num_behind, 5)
                self.assertEqual(
                    setup.scheduler.metrics.num_retracted_reqs > 0, bool({"pool", "retract_interval"} & {*options})
                )

    def test_a_stop_inside_cuts_the_rest(self) -> None:
        for fields, wanted, kind in (
            ({"stop_token_ids": [2]}, [1, 2], "stop"),
            ({"max_new_tokens": 3}, [1, 2], "length"),
            ({"stop_token_ids": [2], "min_new_tokens": 5}, [1, 2, 3, 2], "stop"),
        ):
            with self.subTest(fields):
                setup = self.setup_wide([[1, 2, 3, 2]], [[0, 0, 0, 0]], **fields)
                setup.turn()
                self.assertEqual(setup.channel.outputs["a"][1:], wanted)
                self.assertEqual(setup.channel.reasons["a"].type, kind)
                setup.memory.check_idle(deep=True)
                # Cached are prompt, first token and those before the last: its own slot was never filled rightly.
                # With steps of several tokens the tree knows a token together with the one after it.
                known = self.PROMPT + setup.channel.outputs["a"]
                pairs = [first << 32 | second for first, second in itertools.pairwise([*known, 9, 9])]
                self.assertEqual(setup.memory.tree.match_prefix(pairs).slot_ids.numel(), len(known) - 1)

    def test_a_fault_inside_ends_the_request_there(self) -> None:
        setup = self.setup_wide([[1, 2, 3]], [[0, RowFault.LOGITS, 0]])
        setup.turn()
        self.assertEqual(setup.channel.outputs["a"][1:], [1])
        self.assertEqual(setup.channel.reasons["a"].status_code, 500)
        self.assertEqual(setup.memory.tree.match_prefix(self.PROMPT).kv_len, 0)
        setup.memory.check_idle(deep=True)

    def test_what_was_not_accepted_is_given_back(self) -> None:
        setup = self.setup_wide([[1, 2]], [[0, 0]], return_logprob=False)
        req = setup.scheduler.running_reqs[0]
        before = req.kv_committed_len
        setup.turn()
        self.assertEqual((req.kv_committed_len, req.kv_allocated_len), (before + 2, before + 4))
        self.assertEqual((req.seq_len, req.num_in_flight), (before + 3, 0))

    def test_each_token_has_the_log_probability_of_its_row(self) -> None:
        setup = self.setup_wide([[1, 2, 3]], [[0, 0, 0]])
        req = setup.scheduler.running_reqs[0]
        req.return_logprob = True
        setup.turn()
        self.assertEqual((req.output_logprobs.logprobs, req.output_logprobs.ids), ([-1.0, -2.0, -3.0], [1, 2, 3]))

    def test_a_stream_is_told_when_an_interval_is_passed(self) -> None:
        for interval, told in ((1, True), (4, True), (5, False)):
            setup = self.setup_wide([[1, 2, 3]], [[0, 0, 0]], stream_interval=interval)
            self.assertEqual(len(setup.channel.outputs["a"]), 1)
            setup.turn()
            self.assertEqual(len(setup.channel.outputs["a"]), 4 if told else 1, interval)


class TestPackedColumns(CustomTestCase):
    def test_every_column_comes_back_and_begins_at_16_bytes(self) -> None:
        lengths = {"a": 3, "none": 0, "one": 1, "even": 4, "last": 5}
        columns = {name: torch.randint(1, 99, (length,)) for name, length in lengths.items()}
        packed = pack(columns)
        for name, part in unpacked(packed, columns).items():
            self.assertEqual(part.tolist(), columns[name].tolist(), name)
            self.assertEqual(part.data_ptr() % 16, packed.data_ptr() % 16, name)


if __name__ == "__main__":
    unittest.main()

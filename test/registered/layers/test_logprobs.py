"""Log-probabilities of prompts and of sampled tokens: right on the host, and read only with the step's one copy."""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from sglang.srt.layers import logits_processor as logits_module
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.logprobs import RowLogprobs
from sglang.srt.layers.sampler import Sampler
from sglang.srt.managers.tp_worker import LaunchedStep, StepOutput
from sglang.srt.model_executor.capture_lint import CaptureViolation, capture_lint
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, LogprobRequest, ModelWorkerBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo, SamplingRow
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase

register_cpu_ci(est_time=3, suite="stage-a-test-cpu")

VOCAB, HIDDEN = 19, 6
CHUNKS = (5, 3, 7)  # tokens of each request
ASKED: list[LogprobRequest | None] = [
    LogprobRequest(input_start=1, input_target_ids=(4, 0, 18, 7), top_k=3, token_ids=(2, 9)),
    None,
    LogprobRequest(input_start=0, input_target_ids=(1, 1, 5, 6, 7, 8), top_k=0, token_ids=(11,)),
]


class HostValues(TorchFunctionMode):
    """Refuses what torch copies to a device without its dispatcher: tensors of host values, and indexing by lists."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        index = args[1] if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) else ()
        parts = index if isinstance(index, tuple) else (index,)
        if func is torch.tensor or any(isinstance(part, list) for part in parts):
            raise CaptureViolation(f"{func} brings host values")
        return func(*args, **(kwargs or {}))


class Step:
    """A prefill step of three requests on one device: head, prompt scores and sampling, as a worker runs them."""

    def __init__(self, device: str) -> None:
        total, self.device = sum(CHUNKS), torch.device(device)
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(total, HIDDEN, generator=generator).to(device)
        self.weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(device)
        self.processor, self.sampler = LogitsProcessor(VOCAB), Sampler()
        ids = torch.zeros(total, dtype=torch.int64)
        batch = ModelWorkerBatch.extend([0, 1, 2], [0, 0, 0], list(CHUNKS), ids, ids, logprobs=ASKED)
        self.forward_batch = ForwardBatch.from_worker_batch(batch, self.device, None)
        row = SamplingRow(SamplingParams(temperature=0.0), 0, (), ())
        self.info = SamplingBatchInfo.from_rows([row] * 3, VOCAB, self.device)

    def head(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weight.T

    def run(self) -> tuple[torch.Tensor, LogitsProcessorOutput]:
        output = self.processor(self.hidden, self.head, self.forward_batch)
        counts, chosen = [e.top_k if e else 0 for e in ASKED], [e.token_ids if e else () for e in ASKED]
        return self.sampler(output, self.info, True, counts, chosen), output


def without_pins(run: Callable[[], Step]) -> Step:
    """Pinned memory needs a device."""
    empty = torch.empty
    with mock.patch.object(
        torch, "empty", lambda *a, **k: empty(*a, **{n: v for n, v in k.items() if n != "pin_memory"})
    ):
        return run()


class TestLogprobs(CustomTestCase):
    def check(self, step: Step, found: StepOutput) -> None:
        truth = step.head(step.hidden).double().log_softmax(-1)
        self.assertEqual(sorted(found.prompt_logprobs), [0, 2])
        ends = [sum(CHUNKS[: i + 1]) for i in range(3)]
        for index, asked in enumerate(ASKED):
            if asked is None:
                continue
            blocks = found.prompt_logprobs[index]
            first = ends[index] - CHUNKS[index] + asked.input_start
            rows = truth[first : first + len(asked.input_target_ids)]
            token = [value for block in blocks for value in block.token]
            self.compare(token, [float(rows[i, target]) for i, target in enumerate(asked.input_target_ids)])
            chosen = [pair for block in blocks for row in block.chosen for pair in row]
            self.assertEqual([i for _, i in chosen], list(asked.token_ids) * len(rows))
            self.compare([value for value, _ in chosen], rows[:, list(asked.token_ids)].flatten().tolist())
            top = [pair for block in blocks for row in block.top for pair in row]
            best = rows.topk(asked.top_k) if asked.top_k else rows[:, :0].max(0)
            self.assertEqual([i for _, i in top], best.indices.flatten().tolist())
            self.compare([value for value, _ in top], best.values.flatten().tolist())
        last = truth[[end - 1 for end in ends]]
        self.assertEqual(found.next_token_ids, last.argmax(-1, keepdim=True).tolist())
        assert found.logprobs is not None
        self.compare(found.logprobs.token, last.amax(-1).tolist())
        self.assertEqual([[i for _, i in row] for row in found.logprobs.chosen], [[2, 9], [], [11]])
        self.compare([row[-1][0] for row in found.logprobs.chosen if row], [float(last[0, 9]), float(last[2, 11])])
        self.assertEqual(
            [[i for _, i in row] for row in found.logprobs.top], [last[0].topk(3).indices.tolist(), [], []]
        )

    def compare(self, found: list[float], wanted: list[float]) -> None:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(wanted), atol=1e-5, rtol=0)

    def test_values(self) -> None:
        for block in (1 << 25, 2 * VOCAB):
            with self.subTest(block=block), mock.patch.object(logits_module, "_BLOCK_LOGITS", block):
                step = Step("cpu")
                self.check(step, LaunchedStep(*step.run()).result())
                self.assertEqual(len(step.run()[1].prompt_logprobs), 2 if block > VOCAB * 7 else 5)

    def test_nothing_is_asked(self) -> None:
        logits = torch.eye(3, VOCAB)
        output = LogitsProcessorOutput(logits)
        ids = Sampler()(output, Step("cpu").info)
        found = LaunchedStep(ids, output).result()
        self.assertEqual((found.next_token_ids, found.row_faults), ([[0], [1], [2]], [[0], [0], [0]]))
        self.assertEqual((found.logprobs, found.prompt_logprobs), (None, {}))

    def test_an_id_is_exact_beside_a_log_probability(self) -> None:
        output = LogitsProcessorOutput(torch.zeros(2, VOCAB), row_faults=torch.zeros(2, dtype=torch.int64))
        output.row_logprobs = RowLogprobs(torch.tensor([-0.5, -1.5]))
        for dtype in (torch.int32, torch.int64):
            found = LaunchedStep(torch.tensor([2**24 + 1, 2**31 - 1], dtype=dtype), output).result()
            self.assertEqual(found.next_token_ids, [[2**24 + 1], [2**31 - 1]])
            assert found.logprobs is not None
            self.assertEqual(found.logprobs.token, [-0.5, -1.5])

    def test_several_tokens_per_request(self) -> None:
        """Ids [B, W] and their counts: each request gets its first tokens, and every row has its log-probability."""
        logits = torch.eye(6, VOCAB)
        logits[4, 2] = float("nan")
        output = LogitsProcessorOutput(logits)
        row = SamplingRow(SamplingParams(temperature=0.0), 0, (), ())
        info = SamplingBatchInfo.from_rows([row] * 6, VOCAB, torch.device("cpu"))
        ids = Sampler()(output, info, True, [1] * 6, [(3,)] * 6).view(2, 3)
        found = LaunchedStep(ids, output, torch.tensor([1, 2])).result()
        self.assertEqual((found.next_token_ids[0], found.next_token_ids[1][0]), ([0], 3))
        self.assertEqual((found.row_faults, found.width), ([[0], [0, 1]], 3))
        assert found.logprobs is not None
        self.assertEqual([len(found.logprobs.token), len(found.logprobs.chosen)], [6, 6])

    def test_a_step_neither_reads_the_device_nor_copies_to_it(self) -> None:
        """On a device without values: waiting for a value, or passing host values, is a violation."""
        step = without_pins(lambda: Step("meta"))
        step.run()  # what the requests chose is brought along once
        with torch.inference_mode(), capture_lint(step.device), HostValues():
            ids, output = step.run()
            launched = [t for _, block in output.prompt_logprobs for t in block.tensors()]
            self.assertTrue(all(tensor.device == step.device for tensor in [ids, *launched]))
            for read in (lambda: ids.tolist(), lambda: torch.tensor([1, 2], device="meta"), lambda: ids[[0, 2]]):
                with self.assertRaises(CaptureViolation):
                    read()


if __name__ == "__main__":
    unittest.main()

"""Expected results of AITER's greedy sampling, through the op table and the sampler, on a device or with the fake."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch

from sglang.kernels.ops.sampling.greedy import greedy_sample
from sglang.kernels.registry import REGISTRY
from sglang.srt.environ import envs
from sglang.srt.layers import sampler as sampler_module
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.server_args import ServerArgs, override_server_args, set_global_server_args_for_scheduler
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.test_utils import CustomTestCase

VOCABULARIES = (32000, 128256, 129280, 151936, 151666)
UNSAFE_VOCABULARY = 151666
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAN, INF = float("nan"), float("inf")


class _DummyTPGroup:
    device_group = None


def _mock_global_server_args(backend: str = "pytorch") -> None:
    """Create what upstream's sampler looks up: arguments of the process, and a tensor-parallel group.

    Undo it with ``mock.patch``: it writes into the sampler's module.
    """
    set_global_server_args_for_scheduler(ServerArgs(model_path="dummy", sampling_backend=backend))
    sampler_module.get_tp_group = _DummyTPGroup  # type: ignore[assignment]
    sampler_module.is_dp_attention_enabled = lambda: False


def _make_sampling_info(batch_size: int, vocab_size: int, device: str = "cuda") -> SamplingBatchInfo:
    """A greedy batch by the keywords and shapes that upstream's callers use."""
    return SamplingBatchInfo(
        temperatures=torch.ones(batch_size, 1, device=device),
        top_ps=torch.ones(batch_size, device=device),
        top_ks=torch.zeros(batch_size, device=device, dtype=torch.int32),
        min_ps=torch.zeros(batch_size, device=device),
        is_all_greedy=True,
        is_any_greedy=True,
        need_top_p_sampling=False,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        vocab_size=vocab_size,
        device=device,
    )


class AiterGreedyCases(CustomTestCase):
    """The cases; subclasses say where (``device``), how many rows (``batches``) and prepare the platform."""

    device = "cpu"
    batches: tuple[int, ...] = (1, 2)

    def setUp(self) -> None:
        stack = ExitStack()
        self.addCleanup(stack.close)
        stack.enter_context(envs.SGLANG_USE_AITER.override(True))
        stack.enter_context(fresh_decisions())
        self.generator = torch.Generator().manual_seed(42)

    def random(self, rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(rows, vocab, generator=self.generator).to(self.device, dtype)

    def check(self, logits: torch.Tensor, by_aiter: bool = True) -> None:
        """The op's ids are the first maxima, and came from AITER exactly where that is safe."""
        ids, faults = greedy_sample(logits)
        self.assertEqual(faults.tolist(), [0] * len(logits))
        values = logits.float().cpu()
        first = [int((row == row.max()).nonzero()[0]) for row in values]
        self.assertEqual(ids.tolist(), first, f"{logits.dtype} {tuple(logits.shape)}")
        self.assertEqual(ids.dtype, torch.int32 if by_aiter else torch.int64, f"{tuple(logits.shape)}")

    def sample(self, logits: torch.Tensor, **arguments: object) -> tuple[torch.Tensor, LogitsProcessorOutput]:
        output = LogitsProcessorOutput(next_token_logits=logits)
        rows, vocab = logits.shape
        ids = sampler_module.Sampler()(output, _make_sampling_info(rows, vocab, self.device), **arguments)
        return ids, output

    def test_batches_and_vocabularies(self) -> None:
        for vocab in VOCABULARIES:
            for rows in self.batches:
                self.check(self.random(rows, vocab, DTYPES[rows % 3]), vocab != UNSAFE_VOCABULARY)

    def test_negative_logits(self) -> None:
        for vocab in VOCABULARIES:
            self.check(-self.random(2, vocab).abs() - 1, vocab != UNSAFE_VOCABULARY)

    def test_extreme_values(self) -> None:
        logits = self.random(3, 32000, torch.bfloat16)
        logits[0, 42] = 1e4
        logits[1, 100] = -1e4
        logits[2] = -1e4
        logits[2, 31999] = -9e3
        self.check(logits)

    def test_ties_take_the_first(self) -> None:
        vocab = 32000
        # Inside a vector, over its edge, over a pass of the block, and at both ends of the row.
        pairs = ((3, 4), (15, 16), (16383, 16384), (16, 31999), (0, vocab - 1), (31984, 31999))
        logits = self.random(len(pairs) + 1, vocab, torch.bfloat16)
        for row, pair in enumerate(pairs):
            logits[row, list(pair)] = 50.0
        logits[-1] = -2.0
        self.check(logits)

    def test_rows_that_are_not_side_by_side(self) -> None:
        logits = self.random(6, 32000)
        self.check(logits[::2])
        self.check(logits[:, :16000])
        self.check(logits[:, 8:16008], by_aiter=False)
        self.check(self.random(32000, 3).t(), by_aiter=False)
        self.check(self.random(2, 32000 + 1)[:, :32000], by_aiter=False)

    def test_rows_without_a_winner(self) -> None:
        for vocab in (32000, UNSAFE_VOCABULARY):
            logits = self.random(5, vocab)
            logits[1] = -INF
            logits[2] = NAN
            logits[3, 7] = NAN
            ids, output = self.sample(logits)
            self.assertTrue(bool(((ids >= 0) & (ids < vocab)).all()), f"{vocab}: {ids.tolist()}")
            assert output.row_faults is not None
            self.assertEqual((output.row_faults != 0).tolist(), [False, True, True, True, False])
            self.assertEqual(ids[[0, 4]].tolist(), logits[[0, 4]].argmax(-1).tolist())

    def test_empty_batch(self) -> None:
        self.assertEqual(self.sample(self.random(0, 32000))[0].tolist(), [])

    def test_log_probabilities(self) -> None:
        logits = self.random(3, 32000)
        kept = logits.clone()
        arguments = {"return_logprob": True, "top_logprobs_nums": [2, 0, 1], "token_ids_logprobs": [None, [5], []]}
        ids, output = self.sample(logits, **arguments)
        self.assertEqual(ids.dtype, torch.int32)
        self.assertTrue(torch.equal(logits, kept), "the kernel may not write logits")
        wanted = torch.log_softmax(logits.double(), -1).gather(1, ids.long().unsqueeze(1)).squeeze(1)
        assert output.row_logprobs is not None
        torch.testing.assert_close(output.row_logprobs.token.double(), wanted, atol=1e-5, rtol=0)
        with envs.SGLANG_USE_AITER.override(False), fresh_decisions():
            plain_ids, plain = self.sample(logits, **arguments)
        self.assertEqual(ids.tolist(), plain_ids.tolist())
        found = [out.row_logprobs.read(out.row_logprobs.tensors()) for out in (output, plain) if out.row_logprobs]
        self.assertEqual(found[0], found[1])
        self.assertEqual(
            ([len(row) for row in found[0].top], [len(row) for row in found[0].chosen]), ([2, 0, 1], [0, 1, 0])
        )

    def test_flag_off(self) -> None:
        with envs.SGLANG_USE_AITER.override(False), fresh_decisions():
            self.check(self.random(2, 32000), by_aiter=False)
            self.assertEqual(self.verdict(), "switched off")

    def test_aiter_absent(self) -> None:
        absent = mock.patch.dict(sys.modules, {"aiter": None})
        with absent, mock.patch.object(REGISTRY, "_packages", {}), fresh_decisions():
            with self.assertLogs("sglang.kernels.registry", "WARNING") as logs:
                self.check(self.random(2, 32000), by_aiter=False)
            self.assertIn("aiter is switched on, but does not import", logs.output[0])
            self.assertIn("ModuleNotFoundError", self.verdict())

    def verdict(self) -> str:
        return REGISTRY.records["sampling.greedy"].verdicts["aiter"]

    def test_names_of_the_sampler_module(self) -> None:
        from aiter import greedy_sample as kernel

        logits = self.random(4, 32000, torch.bfloat16)
        expected = logits.float().argmax(-1).tolist()
        calls = []

        def counted(out: torch.Tensor, given: torch.Tensor) -> None:
            calls.append(tuple(given.shape))
            kernel(out, given)

        for use, vocab, dtype, called in ((True, 32000, torch.int32, 1), (False, 32000, torch.int64, 1)):
            with mock.patch.multiple(sampler_module, _use_aiter=use, _aiter_greedy_sample=counted):
                ids, _ = self.sample(logits[:, :vocab])
            self.assertEqual((ids.dtype, ids.tolist(), len(calls)), (dtype, expected, called))
        with mock.patch.multiple(sampler_module, _use_aiter=True, _aiter_greedy_sample=counted):
            self.assertEqual(self.sample(self.random(2, UNSAFE_VOCABULARY))[0].dtype, torch.int64)
        self.assertEqual(len(calls), 1, "an unsafe vocabulary must not reach the kernel")
        for name in ("get_global_server_args", "get_tp_group", "is_dp_attention_enabled"):
            with mock.patch.object(sampler_module, name):
                self.sample(logits)

    def test_a_caller_written_for_upstream(self) -> None:
        """Arguments, group and batch as upstream's own test makes them; ids by AITER and by torch are the same."""
        from aiter import greedy_sample as kernel

        names = ("get_global_server_args", "get_tp_group", "is_dp_attention_enabled")
        stack = self.enterContext(ExitStack())
        stack.enter_context(override_server_args())
        for name in names:
            stack.enter_context(mock.patch.object(sampler_module, name, getattr(sampler_module, name)))
        _mock_global_server_args()
        for rows in self.batches:
            for vocab in (32000, 129280):
                logits = self.random(rows, vocab, torch.bfloat16)
                for return_logprob in (False, True):
                    ids = {}
                    for use_aiter, dtype in ((True, torch.int32), (False, torch.int64)):
                        patches: dict[str, Any] = {"_use_aiter": use_aiter}
                        if use_aiter:
                            patches["_aiter_greedy_sample"] = kernel
                        with mock.patch.multiple(sampler_module, **patches):
                            ids[use_aiter] = sampler_module.Sampler().forward(
                                logits_output=LogitsProcessorOutput(next_token_logits=logits.clone()),
                                sampling_info=_make_sampling_info(rows, vocab, self.device),
                                return_logprob=return_logprob,
                                top_logprobs_nums=[0] * rows,
                                token_ids_logprobs=[None] * rows,
                                positions=torch.arange(rows, device=self.device, dtype=torch.int32),
                            )
                        self.assertEqual(ids[use_aiter].dtype, dtype)
                        self.assertEqual(ids[use_aiter].tolist(), logits.float().argmax(-1).tolist())


# Test runners collect every class of a test file, of which only the subclasses should run.
__all__ = ["UNSAFE_VOCABULARY", "AiterGreedyCases"]

"""Speculation over two ranks gives the tokens of one, even if ranks sample and draft differently: rank 0 decides."""

from __future__ import annotations

import unittest
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.constrained.llguidance_backend import grammar_of
from sglang.srt.distributed.parallel_state import ParallelState, ProcessGroupHandle, override_parallel_state
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import Sampler
from sglang.srt.platforms import override_platform
from sglang.srt.platforms.rocm import RocmOverFakesPlatform, find_fakes
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.engine_harness import EngineHarness
from sglang.test.kernel_choice import fresh_decisions
from sglang.test.process_ranks import run_processes, use_fakes
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

use_fakes()
register_cpu_ci(est_time=30, suite="stage-b-test-cpu")

FORM = grammar_of("regex", "[a-z]{3,9}-[0-9]{2,4}", {})
KINDS: tuple[dict[str, Any], ...] = ({"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9})


class TestTwoRanks(CustomTestCase):
    folder = str(EMBEDDED_MODELS["deepseek-v3-tiny"])

    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)
        tokenizer = Tokenizer.from_path(cls.folder)
        cls.prompts = [tokenizer.encode(question.text) for question in heldout_questions()[:5]]
        cls.wanted = cls.tokens(cls.engine())

    @classmethod
    def engine(cls, **settings: Any) -> EngineHarness:
        options = {"max_total_tokens": 1024, "max_running_requests": 4, "random_seed": 1, "dtype": "float32"}
        return EngineHarness(cls.folder, with_tokenizer=True, **{**options, **settings})

    @classmethod
    def tokens(cls, engine: EngineHarness) -> dict[str, list[int]]:
        for number, prompt in enumerate(cls.prompts):
            params = {"max_new_tokens": 9 + number, "ignore_eos": True, "sampling_seed": number, **KINDS[number % 2]}
            grammar = FORM if number in (1, 4) else None
            engine.submit(f"r{number}", prompt, SamplingParams(**params), grammar=grammar)
        return {rid: result.output_ids for rid, result in engine.run().items()}

    def serve(self, rank: int, **settings: Any) -> None:
        """The requests on one of two ranks; all samples and drafts of rank 1 are wrong."""
        handle = ProcessGroupHandle(rank, 2, dist.group.WORLD, dist.group.WORLD)
        with override_parallel_state(ParallelState(handle, handle)):
            if rank:
                choose = Sampler.forward

                def err(sampler: Sampler, output: LogitsProcessorOutput, *args: Any, **fields: Any) -> torch.Tensor:
                    return output.next_token_logits.shape[-1] - 1 - choose(sampler, output, *args, **fields)

                self.enterContext(mock.patch.object(Sampler, "forward", err))  # captured steps draw so, too
            engine = self.engine(tp_size=2, speculative_algorithm="NEXTN", speculative_num_steps=3, **settings)
            graphs = engine.runner.describe()["graphs"]
            captured = {name: told["captured"] for name, told in graphs.items()}
            assert captured.pop("extend", [24]) == [24] and all(sizes == [4] for sizes in captured.values()), graphs
            assert bool(graphs) == ("attention_backend" in settings)
            found, metrics = self.tokens(engine), engine.scheduler.metrics
        assert found == self.wanted, (rank, found, self.wanted)
        assert 0 < metrics.num_accepted_drafts < metrics.num_drafts

    def test_eager_steps(self) -> None:
        for overlap in (False, True):
            run_processes(2, partial(self.serve, overlap=overlap))

    def test_captured_steps(self) -> None:
        with override_platform(RocmOverFakesPlatform(find_fakes())), fresh_decisions():
            sizes = {"cuda_graph_bs": [4], "piecewise_cuda_graph_tokens": [24]}
            run_processes(2, partial(self.serve, attention_backend="triton", overlap=True, **sizes))

    def test_without_the_broadcast_ranks_differ(self) -> None:
        """Without the broadcast, the wrong tokens of rank 1 change the output."""
        with mock.patch.object(ProcessGroupHandle, "broadcast", lambda group, x: x):
            with self.assertRaisesRegex(AssertionError, "ranks .* of 2 failed"):
                run_processes(2, self.serve)


class TestTwoRanksWithStates(TestTwoRanks):
    """Qwen3.5, each rank with a part of the recurrent states."""

    folder = str(EMBEDDED_MODELS["qwen3.5-moe-tiny"])
    test_captured_steps = test_without_the_broadcast_ranks_differ = None


if __name__ == "__main__":
    unittest.main()

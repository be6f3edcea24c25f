"""Captured steps of speculation: proven at start-up, replayed, with the tokens and drafts of eager steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.model_executor.model_runner import StepForward
from sglang.srt.platforms.host_device import HostGraph
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.accept_graphs import GREEDY_ACCEPT, SAMPLED_ACCEPT
from sglang.srt.speculative.draft_graphs import EXTEND, GREEDY, SAMPLED
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.engine_harness import EngineHarness
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tasks import heldout_questions

RUN = BucketGraphs.run
BUCKETS = [2, 4]
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 4.0, "top_p": 0.98, "top_k": 100, "min_p": 0.001},
    {"temperature": 0.0, "frequency_penalty": 0.6},
)


# A test module that imports these classes must not find test cases in them.
if TYPE_CHECKING:
    _Case = CustomTestCase
else:
    _Case = object


class SpecGraphs(_Case):
    """For test cases: engines of an embedded model on the current platform, with graphs of a few batch sizes."""

    folder = str(EMBEDDED_MODELS["deepseek-v3-tiny"])
    tokenizer: Tokenizer
    prompts: list[list[int]]

    @classmethod
    def setUpClass(cls) -> None:
        torch.set_num_threads(1)  # of many small operations
        cls.tokenizer = Tokenizer.from_path(cls.folder)
        cls.prompts = [cls.tokenizer.encode(question.text) for question in heldout_questions()[:5]]

    def engine(self, num_steps: int = 3, **settings: Any) -> EngineHarness:
        spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": num_steps} if num_steps else {}
        options = {"max_total_tokens": 1024, "max_running_requests": 4, "cuda_graph_bs": BUCKETS, "random_seed": 1}
        options |= {"attention_backend": "triton", "dtype": "float32", "disable_piecewise_cuda_graph": True}
        return EngineHarness(self.folder, with_tokenizer=True, **{**options, **spec, **settings})

    def tokens(self, engine: EngineHarness) -> dict[str, list[int]]:
        """Of a batch for each of KINDS, one after the other."""
        for kind, fields in enumerate(KINDS):
            for number, prompt in enumerate(self.prompts[: 5 - kind]):
                params = {"max_new_tokens": 5 + number, "ignore_eos": True, "sampling_seed": number, **fields}
                engine.submit(f"{kind} {number}", prompt, SamplingParams(**params))
            engine.run()
        return {rid: result.output_ids for rid, result in engine.results.items()}


def no_call_left_out(
    test: CustomTestCase,
    graphs: BucketGraphs[Any],
    prove: Callable[[], None],
    every: int,
    idle: Container[str] = (),
    bucket: int = 2,
) -> None:
    """The proof refuses ``bucket`` once any of its calls is left out, of which a few are.

    idle: names of calls that find nothing to do.
    """
    step = graphs._steps[bucket]
    assert isinstance(step.graph, HostGraph)
    calls = step.graph._calls
    acting = [index for index, call in enumerate(calls) if "empty" not in call.name and call.name not in idle]
    for index in acting[::every]:
        graphs.refused.clear()
        left_out = calls.pop(index)
        for result in left_out.results:  # which hold what the proof of the last turn left
            _ = None if result is None else result.zero_()
        try:
            prove()
        except RuntimeError as error:  # an index that is none
            graphs.refused[bucket] = str(error)
        test.assertIn(bucket, graphs.refused, (graphs.name, index, left_out.name))
        graphs._steps[bucket] = step
        calls.insert(index, left_out)
    graphs.refused.clear()
    prove()
    test.assertEqual(graphs.refused, {})


class VerifyCases(SpecGraphs):
    """Tokens of engines with graphs against those without, and without speculation."""

    STEPS: tuple[int, ...] = (1, 3)

    def proposals(self, engine: EngineHarness) -> list[list[list[int]]]:
        """From here on, the drafts of an engine that somebody reads, step by step.

        After a chunk before the end of a prompt there is none: such requests share the padding row's slots, so what
        is drafted there depends on which of them a device writes last.
        """
        assert engine.worker.speculator is not None
        drafter: Any = engine.worker.speculator.drafter
        found: list[list[list[int]]] = []
        propose = drafter.propose

        def watched(step: StepForward, *args: Any) -> torch.Tensor:
            drafts = propose(step, *args)
            unread = (
                [False] * len(drafts)
                if step.forward_batch.successors is None
                else (step.forward_batch.successors >= 0).tolist()
            )
            found.append([row for row, skipped in zip(drafts.tolist(), unread, strict=True) if not skipped])
            return drafts

        drafter.propose = watched
        return found

    def count_replays(self) -> Counter[str]:
        """From here on, by kind of step."""
        found: Counter[str] = Counter()

        def run(graphs: BucketGraphs[Any], bucket: int) -> Any:
            found[graphs.name] += 1
            return RUN(graphs, bucket)

        self.enterContext(mock.patch.object(BucketGraphs, "run", run))
        return found

    def test_replayed_steps_give_the_tokens_of_eager_ones(self) -> None:
        wanted = self.tokens(self.engine(0, disable_cuda_graph=True))
        for num_steps in self.STEPS:
            with self.subTest(num_steps=num_steps):
                engine = self.engine(num_steps)
                graphs = engine.runner.decode_graphs
                assert graphs is not None
                self.assertEqual((graphs.name, graphs.kind.rows_per_request), ("verify", num_steps + 1))
                names = ["verify", EXTEND, GREEDY, SAMPLED, GREEDY_ACCEPT, SAMPLED_ACCEPT]
                told = {name: {"captured": BUCKETS, "refused": {}} for name in names}
                self.assertEqual(engine.runner.describe()["graphs"], told)
                replayed, drafts = self.count_replays(), self.proposals(engine)
                with mock.patch.object(graphs, "replay", wraps=graphs.replay) as replay:
                    self.assertEqual(self.tokens(engine), wanted)
                sizes = [(call.args[0].batch_size, call.args[1]) for call in replay.call_args_list]
                self.assertTrue({(4, 4), (3, 4)} <= set(sizes), sizes)
                metrics = engine.scheduler.metrics
                self.assertEqual(len(sizes), metrics.num_decode_steps)
                self.assertEqual(replayed["verify"], replayed[EXTEND])
                # A batch with penalties is sampled eagerly, and so are its chains; those after prompts are replayed.
                self.assertTrue(all(replayed[name] for name in names), replayed)
                self.assertLess(replayed[GREEDY_ACCEPT] + replayed[SAMPLED_ACCEPT], len(sizes))
                self.assertLess(replayed[GREEDY] + replayed[SAMPLED], len(sizes) + metrics.num_prefill_steps)
                eager = self.engine(num_steps, disable_cuda_graph=True)
                wanted_drafts = self.proposals(eager)
                self.assertEqual(self.tokens(eager), wanted)
                self.assertEqual(drafts, wanted_drafts)
                self.assertGreater(metrics.num_accepted_drafts, 0)
                self.assertLess(metrics.num_accepted_drafts, metrics.num_drafts)
                padding = engine.runner.req_to_token_pool.padding_row
                assert engine.runner.relay is not None
                left = (engine.runner.last_token, engine.runner.relay.committed, engine.runner.relay.drafts)
                self.assertEqual([int(tensor[padding].abs().sum()) for tensor in left], [0, 0, 0])

    def test_a_request_alone(self) -> None:
        """A step of one request, captured and eager: what is spread over its rows may not be a view of one element."""
        wanted = self.alone(self.engine(0, disable_cuda_graph=True))
        for settings in ({"cuda_graph_bs": [1]}, {"disable_cuda_graph": True}):
            with self.subTest(**settings):
                self.assertEqual(self.alone(self.engine(3, **settings)), wanted)

    def alone(self, engine: EngineHarness) -> list[int]:
        """Greedy tokens of the first prompt, without another request."""
        engine.submit("alone", self.prompts[0], SamplingParams(temperature=0.0, max_new_tokens=24, ignore_eos=True))
        return engine.run()["alone"].output_ids

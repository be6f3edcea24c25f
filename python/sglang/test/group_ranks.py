"""Engines in processes that are attention groups, or expert ranks, of one replica, stepped together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

from sglang.embedded_models import EMBEDDED_MODELS
from sglang.srt.distributed.parallel_state import get_tp_group, override_parallel_state
from sglang.srt.environ import envs
from sglang.srt.managers.dp_sync import DpStepSync
from sglang.srt.model_executor.bucket_graphs import BucketGraphs
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.draft_graphs import EXTEND, GREEDY, SAMPLED
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.test.engine_harness import EngineHarness
from sglang.test.ep_world import process_state
from sglang.test.tiny_tasks import heldout_questions

# A request: its prompt, its sampling parameters, and the step before which it arrives.
Asked = tuple[Sequence[int], Mapping[str, Any], int]
COLD, WARM = {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}
PENALISED = {"temperature": 0.0, "frequency_penalty": 0.6}
MORI: dict[str, Any] = {"moe_a2a_backend": "mori"}
GRAPHS = {"attention_backend": "triton", "cuda_graph_bs": [2, 4], "max_running_requests": 4}
SIZES = {"max_total_tokens": 2048, "random_seed": 1, "dtype": "float32"}


class RankEngine:
    """The engine of one of ``world`` processes, which are ``groups`` attention groups; ``settings`` are the server's.

    Every rank makes it, and calls ``serve`` as often as the others.
    """

    def __init__(self, rank: int, world: int, groups: int, folder: str, **settings: Any) -> None:
        self.state = process_state(rank, world, groups)
        many = {"tp_size": world, "dp_size": groups, "enable_dp_attention": groups > 1, "ep_size": world}
        with override_parallel_state(self.state):
            self.engine = EngineHarness(folder, **{**SIZES, "max_running_requests": 6, **many, **settings})
        self.group = self.state.attn_dp_rank
        if groups > 1:
            self.engine.scheduler.sync = DpStepSync(self.state, self.engine.runner.graph_bucket)

    def serve(self, asked: Sequence[Mapping[str, Asked]]) -> dict[str, list[int]]:
        """Tokens of the requests of this rank's group, by name; ``asked`` are those of every group.

        Steps together with the other ranks until all groups are idle.
        """
        engine, own, number = self.engine, asked[self.group], 0
        last = max((at for requests in asked for _, _, at in requests.values()), default=0)
        with override_parallel_state(self.state):
            while number <= last or not self._is_idle():
                for rid, (prompt, params, at) in own.items():
                    if at == number:
                        engine.submit(rid, list(prompt), SamplingParams(**params))
                engine.step()
                number += 1
        engine.memory.check_idle(deep=True)
        return {rid: engine.results[rid].output_ids for rid in own}

    def _is_idle(self) -> bool:
        scheduler = self.engine.scheduler
        return not scheduler.has_work() if scheduler.sync is None else scheduler._all_idle


def nothing_received(engine: EngineHarness) -> None:
    """AssertionError if a starting server counts rows of the check of its graphs as load."""
    told = engine.runner.describe()["experts"].get("received_rows", {"live": 0})
    assert told["live"] == 0, told


def err_behind_rank_zero(engine: EngineHarness) -> None:
    """Make samples and drafts wrong on every rank but the first of each group, which must not matter."""
    speculator, vocab = engine.worker.speculator, engine.model_config.vocab_size
    assert speculator is not None
    if get_tp_group().rank:
        sample, propose = engine.runner.sample, speculator.drafter.propose
        engine.runner.sample = lambda *args: vocab - 1 - sample(*args)  # type: ignore[method-assign]
        speculator.drafter.propose = lambda *args: vocab - 1 - propose(*args)  # type: ignore[method-assign]


def refuse_draft_extend(engine: EngineHarness) -> None:
    """Let no graph run the layer over the rows of a verify step, as if its check had failed."""
    graphs = engine.runner.draft_graphs[EXTEND]
    for bucket in graphs.buckets:
        graphs._refuse(bucket, "asked for")


class TwoGroups:
    """The requests to two groups of a model, and the replies of one rank to all of them without speculation.

    Group 1 comes later, so it is idle first, prefills while group 0 verifies, and continues when group 0 is idle. It
    has fewer requests. One of its requests draws from other logits than the model's.

    prompts: seven. chunk: tokens of a prompt chunk of a group. options: of every engine.
    """

    def __init__(self, folder: str, prompts: Sequence[Sequence[int]], chunk: int = 8, **options: Any) -> None:
        self.folder, self.chunk, self.options = folder, chunk, options
        kinds = (COLD, WARM, COLD, WARM, COLD, PENALISED, WARM)
        arrivals = (0, 0, 0, 2, 4, 14, 14)
        self.asked: tuple[dict[str, Asked], dict[str, Asked]] = ({}, {})
        plain = EngineHarness(self.folder, disable_cuda_graph=True, **{**SIZES, **options})
        for number, (prompt, kind, at) in enumerate(zip(prompts, kinds, arrivals, strict=True)):
            params: dict[str, Any] = {**kind, "max_new_tokens": 9 + number, "ignore_eos": True, "sampling_seed": number}
            self.asked[number >= 4][f"r{number}"] = (prompt, params, at)
            plain.submit(f"r{number}", list(prompt), SamplingParams(**params))
        self.wanted = {rid: result.output_ids for rid, result in plain.run().items()}

    @classmethod
    def of_embedded(cls, name: str) -> TwoGroups:
        """Questions to an embedded model."""
        folder = str(EMBEDDED_MODELS[name])
        tokenizer = Tokenizer.from_path(folder)
        return cls(folder, [tokenizer.encode(question.text) for question in heldout_questions()[:7]])

    def serve(
        self,
        rank: int,
        world: int = 2,
        groups: int = 2,
        num_steps: int = 3,
        prepare: Callable[[EngineHarness], None] = lambda engine: None,
        **settings: Any,
    ) -> RankEngine:
        """The requests on one rank; AssertionError if a token differs or nothing was accepted, rejected or idle.

        prepare: what is done to the engine first.
        """
        spec = {"speculative_algorithm": "NEXTN", "speculative_num_steps": num_steps}
        options = {"overlap": True, "chunked_prefill_size": self.chunk * groups, **self.options, **spec}
        one = RankEngine(rank, world, groups, self.folder, **{**options, **settings})
        with override_parallel_state(one.state):
            prepare(one.engine)
        asked = self.asked if groups > 1 else (self.asked[0] | self.asked[1],)
        found, metrics = one.serve(asked), one.engine.scheduler.metrics
        wanted = {rid: self.wanted[rid] for rid in asked[one.group]}
        assert found == wanted, (rank, found, wanted)
        assert 0 < metrics.num_accepted_drafts < metrics.num_drafts
        assert (metrics.num_idle_steps > 0) == (groups > 1), (rank, metrics.num_idle_steps)
        return one

    def serve_capped(self, rank: int, cap: int, **settings: Any) -> None:
        """As ``serve`` over MORI's protocol, under a cap of received rows that a verify step exceeds, or none (0)."""
        with envs.SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS.override(cap):
            one = self.serve(rank, **MORI, **settings)
        told = one.engine.runner.describe()["experts"]["received_rows"]
        assert (told["most_rounds"] > 1) == (cap > 0), told
        assert told["suggested_cap"] >= 3 * one.engine.worker.decode_kind.rows_per_request, told

    def replay(self, rank: int, groups: int = 2, **settings: Any) -> None:
        """As ``serve``, every kind of step captured."""
        counts: Counter[str] = Counter()
        serving, run, serve = False, BucketGraphs.run, RankEngine.serve

        def counted_run(graphs: BucketGraphs[Any], bucket: int) -> Any:
            counts[graphs.name] += serving
            return run(graphs, bucket)

        def counted_serve(one: RankEngine, asked: Any) -> dict[str, list[int]]:
            nonlocal serving
            serving = True
            return serve(one, asked)

        patches = (
            mock.patch.object(BucketGraphs, "run", counted_run),
            mock.patch.object(RankEngine, "serve", counted_serve),
        )
        with patches[0], patches[1]:
            one = self.serve(rank, groups=groups, prepare=nothing_received, **{**GRAPHS, **settings})
        graphs = one.engine.runner.describe()["graphs"]
        assert all(told["captured"] == [2, 4] and not told["refused"] for told in graphs.values()), graphs
        chains = counts[GREEDY] + counts[SAMPLED]
        assert counts["verify"] == counts[EXTEND] > 0 < chains, counts
        # If any request of a step has logit edits, its chains are eager on all ranks, as are those after prompts.
        assert groups == 1 or chains < counts["verify"], counts

"""Engines in processes that are attention groups, or expert ranks, of one replica, stepped together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sglang.srt.distributed import override_parallel_state
from sglang.srt.managers.dp_sync import StepAgreement
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.test.engine_harness import EngineHarness
from sglang.test.ep_world import process_state

# A request: its prompt, its sampling parameters, and the step before which it arrives.
Asked = tuple[Sequence[int], Mapping[str, Any], int]
SPEC = {"speculative_algorithm": "NEXTN"}


class RankEngine:
    """The engine of one of ``world`` processes, which are ``groups`` attention groups; ``settings`` are the server's.

    Every rank makes it, and calls ``serve`` as often as the others.
    """

    def __init__(self, rank: int, world: int, groups: int, folder: str, **settings: Any) -> None:
        self._state = process_state(rank, world, groups)
        sizes = {"max_total_tokens": 2048, "max_running_requests": 6, "random_seed": 1, "dtype": "float32"}
        many = {"tp_size": world, "dp_size": groups, "enable_dp_attention": groups > 1, "ep_size": world}
        with override_parallel_state(self._state):
            self.engine = EngineHarness(folder, **{**sizes, **many, **settings})
        self.group = self._state.attn_dp_rank
        if groups > 1:
            self.engine.scheduler.sync = StepAgreement(self._state, self.engine.runner.graph_bucket)

    def serve(self, asked: Sequence[Mapping[str, Asked]]) -> dict[str, list[int]]:
        """Tokens of the requests of this rank's group, by name; ``asked`` are those of every group.

        Steps together with the other ranks until all groups are idle.
        """
        engine, own, number = self.engine, asked[self.group], 0
        last = max((at for requests in asked for _, _, at in requests.values()), default=0)
        with override_parallel_state(self._state):
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

"""What the scheduler needs of the resolved arguments, the model and the pools, frozen at start-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sglang.kernels.compile_watch import compiled_while_serving
from sglang.kernels.registry import REGISTRY
from sglang.srt.configs.cache_layout import FULL
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import get_parallel_state
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_policy import PrefillLimits
from sglang.srt.model_executor.model_pools import slots_for_drafts
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.audit import unpickle_count


@dataclass(frozen=True)
class SchedulerConfig:
    """``max_req_len`` in tokens; ``retract_interval`` in steps, 0: only when full."""

    args: ServerArgs
    device: torch.device
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    prefill: PrefillLimits
    max_req_len: int
    random_seed: int
    retract_interval: int
    deep_pool_check: bool
    pool_plan: tuple[str, ...] = ()
    dp_rank: int = 0
    dp_size: int = 1
    describe_model: Callable[[], dict[str, Any]] = dict
    overlap_trace: Callable[[], list[dict[str, Any]]] = list

    @classmethod
    def create(
        cls, args: ServerArgs, model_config: ModelConfig, runner: ModelRunner, dp_rank: int = 0
    ) -> SchedulerConfig:
        """From resolved arguments and the pools of the runner."""
        chunk = args.chunked_prefill_size if (args.chunked_prefill_size or 0) > 0 else None
        return cls(
            args=args,
            device=runner.device,
            vocab_size=model_config.vocab_size,
            eos_token_ids=model_config.eos_token_ids,
            prefill=PrefillLimits(args.max_prefill_tokens, chunk, runner.req_to_token_pool.size),
            # Drafts need slots in addition to those of all tokens that a request may have.
            max_req_len=min(model_config.context_len, runner.pools.size(FULL) - slots_for_drafts(args)),
            random_seed=args.random_seed or 0,
            retract_interval=envs.SGLANG_TEST_RETRACT_INTERVAL.get() if envs.SGLANG_TEST_RETRACT.get() else 0,
            deep_pool_check=envs.SGLANG_DEBUG_POOL_CHECK.get(),
            pool_plan=runner.memory.sizes.lines,
            dp_rank=dp_rank,
            dp_size=args.dp_size,
            describe_model=runner.describe,
            overlap_trace=runner.overlap_trace,
        )

    def seed_of(self, params: SamplingParams, number: int) -> int:
        """The request's own seed, or one for request ``number`` of this scheduler."""
        if params.sampling_seed is not None:
            return params.sampling_seed
        return (self.random_seed * 1_000_003 + number * self.dp_size + self.dp_rank) % 2**63

    def stop_ids_of(self, params: SamplingParams) -> frozenset[int]:
        """Ids that end a request: its own stop ids, and the model's unless it ignores them."""
        return frozenset(params.stop_token_ids) | frozenset(() if params.ignore_eos else self.eos_token_ids)

    def describe(self) -> dict[str, Any]:
        """Platform, kernels and plan for /server_info; msgpack-able."""
        state = get_parallel_state()
        return {
            "dp_rank": self.dp_rank,
            "world_size": state.world.size,
            "attn_tp_size": state.tp.size,
            "ep_size": state.ep_size,
            "platform": current_platform.describe(),
            "fakes": list(current_platform.fakes),
            "kernels": REGISTRY.report(),
            "missing_kernel_modules": dict(REGISTRY.missing_modules),
            "compiled_while_serving": compiled_while_serving(),
            "memory_plan": list(self.pool_plan),
            "max_req_len": self.max_req_len,
            **self.describe_model(),
            "unpickled_while_serving": unpickle_count(),
        }

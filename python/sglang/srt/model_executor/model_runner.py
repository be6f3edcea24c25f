"""One rank's model: weights, pools, attention backend, and the forward and sampling of a step."""

from __future__ import annotations

import logging
import time
from typing import TypeVar

import torch

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import get_tp_group
from sglang.srt.layers.attention import make_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionContext
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.sampler import Sampler
from sglang.srt.mem_cache.allocator import ReqToTokenPool
from sglang.srt.mem_cache.pool_plan import plan_pool_sizes
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ModelWorkerBatch
from sglang.srt.model_executor.model_pools import (
    kv_bytes_per_token,
    make_kv_pool,
    make_state_pool,
    state_bytes_per_slot,
)
from sglang.srt.model_loader.loader import load_model
from sglang.srt.platforms import current_platform
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

Number = TypeVar("Number", int, float)
# One live state a running request, and as many again thrice for snapshots of the prefix cache, unless memory is short.
STATE_SLOTS_PER_REQUEST = 4


class ModelRunner:
    """Loads the model of this rank, sizes its pools from what is left, and runs steps."""

    def __init__(self, args: ServerArgs, model_config: ModelConfig) -> None:
        self.model_config = model_config
        self.args = args
        rank = get_tp_group().rank
        current_platform.set_device(rank)
        self.device: torch.device = current_platform.device(rank)
        started = time.perf_counter()
        self.model = load_model(model_config, args.load_format, self.device, args.random_seed or 0)
        self.model.eval()
        logger.info("weights are loaded (%.1f s)", time.perf_counter() - started)
        self.max_running_requests = _required(args.max_running_requests, "max_running_requests")
        self._make_pools(rank)
        context = AttentionContext(
            model_config=model_config,
            req_to_token_pool=self.req_to_token_pool,
            kv_pool=self.kv_pool,
            state_pool=self.state_pool,
            page_size=self.page_size,
            device=self.device,
        )
        self.attn_backend = make_attention_backend(args.attention_backend, context)
        self.sampler = Sampler()

    def _make_pools(self, rank: int) -> None:
        args, config = self.args, self.model_config
        tp_size = get_tp_group().size
        self.page_size = _required(args.page_size, "page_size")
        free, _ = current_platform.memory_info(rank)
        plan = plan_pool_sizes(
            available_bytes=int(free * _required(args.mem_fraction_static, "mem_fraction_static")),
            bytes_per_token=kv_bytes_per_token(config, tp_size),
            max_running_requests=self.max_running_requests,
            page_size=self.page_size,
            bytes_per_state_slot=state_bytes_per_slot(config, tp_size, args.mamba_ssm_dtype),
            max_total_tokens=args.max_total_tokens,
            max_mamba_cache_size=args.max_mamba_cache_size,
            disable_radix_cache=args.disable_radix_cache,
        )
        # More tokens than all running requests can hold, twice over for the prefix cache, would never be used.
        useful = 2 * self.max_running_requests * config.context_len
        useful += -useful % self.page_size
        tokens = plan.num_tokens if args.max_total_tokens is not None else min(plan.num_tokens, useful)
        self.pool_plan_lines = plan.lines
        for line in plan.lines:
            logger.info("%s", line)
        self.max_total_num_tokens = tokens
        self.req_to_token_pool = ReqToTokenPool(self.max_running_requests, config.context_len + 1, self.device)
        self.kv_pool = make_kv_pool(config, tokens, self.page_size, tp_size, self.device)
        slots = min(plan.num_state_slots, STATE_SLOTS_PER_REQUEST * self.max_running_requests)
        self.state_pool = make_state_pool(config, slots, tp_size, self.device, args.mamba_ssm_dtype)

    @torch.inference_mode()
    def forward(self, batch: ModelWorkerBatch, input_ids: torch.Tensor | None = None) -> LogitsProcessorOutput:
        """Logits of the last row of each request, and the prompt log-probabilities asked for.

        ``input_ids`` [N] int64 on the device replace ``batch.input_ids`` in decode.
        """
        fb = ForwardBatch.from_worker_batch(batch, self.device, self.attn_backend, input_ids)
        self.attn_backend.init_forward_metadata(fb)
        output: LogitsProcessorOutput = self.model(fb.input_ids, fb.positions, fb)
        return output

    @torch.inference_mode()
    def sample(self, output: LogitsProcessorOutput, info: SamplingBatchInfo, batch: ModelWorkerBatch) -> torch.Tensor:
        """Next token ids [B]; the drawn token of request i sits at position ``seq_lens[i]`` of its sequence."""
        positions = torch.tensor(batch.seq_lens, dtype=torch.int64, device=self.device)
        return self.sampler(
            output,
            info,
            return_logprob=bool(batch.logprobs),
            top_logprobs_nums=[entry.top_k if entry else 0 for entry in batch.logprobs],
            token_ids_logprobs=[entry.token_ids if entry else () for entry in batch.logprobs],
            positions=positions,
        )


def _required(value: Number | None, name: str) -> Number:
    if value is None:
        raise ValueError(f"server argument {name} is not resolved")
    return value

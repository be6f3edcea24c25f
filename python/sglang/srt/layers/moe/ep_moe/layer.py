"""Routed experts that are distributed over ranks; tokens are sent to the ranks of their experts."""

from __future__ import annotations

import logging

import torch

from sglang.kernels.ops.quant.group_fp8 import QuantizedRows
from sglang.srt.configs.quantization import QuantConfig
from sglang.srt.layers.moe.fused_moe import FusedMoE
from sglang.srt.layers.moe.token_dispatcher.capacity import (
    ROW_TIERS,
    Round,
    input_bound,
    input_rows,
    plan_rounds,
    rows_of_ranks,
    slice_of,
)
from sglang.srt.layers.moe.token_dispatcher.config import MoriConfig
from sglang.srt.layers.moe.token_dispatcher.moriep import (
    MoriEPNormalCombineInput,
    MoriEPNormalDispatchOutput,
    make_dispatcher,
)
from sglang.srt.layers.moe.topk import TopKOutput
from sglang.srt.layers.quantization import Rows
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.platforms import current_platform

logger = logging.getLogger(__name__)


class MoriEPMoE(FusedMoE):
    """Experts over all ranks of the replica; ``MoriEPDispatcher`` exchanges the tokens.

    Each rank dispatches its slice of its attention group's rows; the result is a part of a sum over that group.
    """

    rows_travel = True

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        top_k: int,
        config: MoriConfig,
        quant_config: QuantConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(num_experts, hidden, intermediate, top_k, quant_config, prefix)
        ranks = self.ranks
        if ranks.ep_size != ranks.world.size:
            raise ValueError(f"the MORI protocol needs --ep-size {ranks.world.size} (--tp-size), got {ranks.ep_size}")
        device = self.w13_weight.device
        self.dispatcher = make_dispatcher(
            config, ranks.world, num_experts, hidden, top_k, torch.get_default_dtype(), device,
            self.quant_method.row_dtype,
        )  # fmt: skip
        self.mori_moe_max_input_tokens = config.moe_max_input_tokens
        self._tiers = ROW_TIERS[current_platform.kind]
        self.recv_stats = self.dispatcher.recv_stats
        # 1 for each expert of this rank, by global id.
        mask = torch.zeros(num_experts, dtype=torch.int32, device=device)
        mask[self.placement.first : self.placement.first + self.placement.count] = 1
        self.register_buffer("expert_mask", mask, persistent=False)

    def forward(self, x: torch.Tensor, topk: TopKOutput, forward_batch: ForwardBatch | None = None) -> torch.Tensor:
        """x [N, H], topk with k = ``top_k`` -> new [N, H]: zero except this rank's slice of the rows."""
        self.check_columns(topk)
        rows = self._rows_of_ranks(x.shape[0], forward_batch)
        sizes = self.dispatcher.config
        rounds = plan_rounds(rows, sizes.max_recv, sizes.max_num_inp_token_per_rank)
        self.recv_stats.record_step(sizes.least_cap(rows), len(rounds))
        tp, rank = self.ranks.tp, self.ranks.world.rank
        first, _ = slice_of(x.shape[0], tp.rank, tp.size)
        weights, ids = self._keep_padding_here(topk, forward_batch)
        # Never the transport's own storage: the next layer's combine would overwrite the residual stream.
        out = torch.zeros_like(x) if tp.size > 1 else torch.empty_like(x)
        for part in rounds:
            span = slice(first + part.first[rank], first + part.end[rank])
            self.dispatcher.dispatch_a(x[span], TopKOutput(weights[span], ids[span]), part.rows)
            arrived = self.dispatcher.dispatch_b(self._input_rows(part))
            self.dispatcher.combine_a(self.run_moe_core(arrived))
            out[span] = self.dispatcher.combine_b()
        return out

    def run_moe_core(self, dispatch_output: MoriEPNormalDispatchOutput) -> MoriEPNormalCombineInput:
        """The experts of this rank on the first ``recv_cap`` received rows (0: the whole buffer) -> their results.

        ``recv_cap`` is a proven bound of the received rows; rows past these are stale and reach no expert.
        """
        arrived = dispatch_output
        num_rows, total = arrived.recv_cap or arrived.hidden_states.shape[0], arrived.num_recv_tokens_per_expert
        self.recv_stats.record_dispatch(total, num_rows)
        ids = self.placement.local_ids(arrived.topk_ids[:num_rows])
        stale = torch.arange(num_rows, dtype=torch.int32, device=ids.device) >= total
        ids = ids.masked_fill(stale.unsqueeze(1), -1)
        rows: Rows = arrived.hidden_states[:num_rows]
        if arrived.hidden_states_scale is not None:
            rows = QuantizedRows(rows, arrived.hidden_states_scale[:num_rows], arrived.out_dtype)
        results = self.run_experts(rows, arrived.topk_weights[:num_rows], ids)
        return MoriEPNormalCombineInput(results, arrived.origin_topk_ids, arrived.origin_topk_weights)

    def _rows_of_ranks(self, num_rows: int, forward_batch: ForwardBatch | None) -> tuple[int, ...]:
        """The rows that each rank dispatches in this step, from metadata that all ranks have."""
        dp_size, dp_rank = self.ranks.attn_dp_size, self.ranks.attn_dp_rank
        groups = None if forward_batch is None else forward_batch.rows_of_groups
        if groups is None and dp_size == 1:
            groups = [num_rows]
        if groups is None or len(groups) != dp_size or groups[dp_rank] != num_rows:
            raise RuntimeError(
                f"attention group {dp_rank} of {dp_size} has {num_rows} rows, but the step's metadata says {groups}"
            )
        return rows_of_ranks(groups, self.ranks.tp.size)

    def _input_rows(self, part: Round) -> int:
        """Rows for the experts in one round: the proven bound, raised to a tier."""
        capacity = self.dispatcher.config.max_recv
        bound = input_bound(part.rows, capacity)
        manual = self.mori_moe_max_input_tokens
        if manual and manual < bound and self.recv_stats.record_raised_limit() == 1:
            logger.warning(
                "SGLANG_MORI_MOE_MAX_INPUT_TOKENS=%d is raised to %d, the rows that can arrive in this step; "
                "the same in other steps (logged once, counted in /server_info)", manual, bound,
            )  # fmt: skip
        return input_rows(bound, capacity, self._tiers, manual)

    def _keep_padding_here(
        self, topk: TopKOutput, forward_batch: ForwardBatch | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Padding rows go to an expert of this rank with weight 0, so that they are not sent and need no special
        case."""
        if forward_batch is None:
            return topk.weights, topk.ids
        padding = (
            torch.arange(topk.ids.shape[0], device=topk.ids.device) >= forward_batch.num_token_non_padded
        ).unsqueeze(1)
        return topk.weights.masked_fill(padding, 0.0), topk.ids.masked_fill(padding, self.placement.first)

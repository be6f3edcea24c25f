"""Buffers between the captured steps of speculation: a verify step's rows and result, and where chains start."""

from __future__ import annotations

import torch

from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.model_executor.step_graphs import REQ_ROWS, SEQ_LENS
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.mtp_drafter import ChainStart
from sglang.srt.speculative.spec_info import SpecInfo
from sglang.srt.speculative.verify import Accepted


class SpecBuffers:
    """Persistent inputs of the captured steps, for up to ``max_bs`` requests; those past a batch are padding.

    Request rows, positions, lengths and slots are in ``step``, the buffers of captured verify steps. An eager step
    writes its own there.
    """

    def __init__(self, max_bs: int, spec: SpecInfo, runner: ModelRunner) -> None:
        assert runner.decode_graphs is not None
        self.step = runner.decode_graphs.buffers
        self.width, device = spec.num_draft_tokens, runner.device
        dtype, draft = runner.model_config.dtype, runner.loaded.draft
        assert draft is not None
        self.padding_row = runner.req_to_token_pool.padding_row
        self.vocab_size = runner.model_config.vocab_size
        self.rows, self.lengths = self.step.requests[REQ_ROWS], self.step.requests[SEQ_LENS]
        # The verify step: sampled ids, how many are accepted, the row before each request's, the target's hidden rows.
        self.sampled = torch.zeros(max_bs, self.width, dtype=torch.int64, device=device)
        self.num_new = torch.ones(max_bs, dtype=torch.int64, device=device)
        self.row_before = torch.arange(max_bs, device=device) * self.width - 1
        self.step_hidden = torch.zeros(max_bs * self.width, draft.hidden_width, dtype=dtype, device=device)
        # The start of the chain.
        self.logits = torch.zeros(max_bs, self.vocab_size, dtype=torch.float32, device=device)
        self.hidden = torch.zeros(max_bs, draft.hidden_width, dtype=dtype, device=device)
        self.at = torch.zeros_like(self.num_new)
        # Sampling parameters of each request, by the names of SamplingBatchInfo.
        self._columns = {
            **{name: torch.ones(max_bs, 1, device=device) for name in ("temperatures", "top_ps", "min_ps")},
            "top_ks": torch.full((max_bs, 1), self.vocab_size, dtype=torch.int64, device=device),
            "sampling_seed": torch.zeros_like(self.num_new),
            "greedy_rows": torch.ones(max_bs, dtype=torch.bool, device=device),
        }
        # The batch whose parameters are in the tensors above.
        self._filled: SamplingBatchInfo | None = None

    def fill_rows(self, rows: torch.Tensor, bucket: int) -> None:
        """Write the request rows [B] of a step, and padding."""
        size = rows.shape[0]
        self.rows[:size] = rows
        self.rows[size:bucket] = self.padding_row
        self.step.num_tokens.fill_(size * self.width)
        self.step.num_requests.fill_(size)

    def fill_step(self, accepted: Accepted, placed: ForwardBatch, hidden: torch.Tensor, bucket: int) -> None:
        """Write a verify step's result; padding keeps nothing of an older result, which might not be finite."""
        size, width = accepted.sampled.shape
        assert hidden.dtype == self.step_hidden.dtype, "hidden rows are stored without conversion"
        self.lengths[:size] = placed.seq_lens[:size]
        self.lengths[size:bucket] = width
        for ours, theirs in zip(self.step.tokens, (placed.positions, placed.out_cache_loc), strict=True):
            ours[: size * width] = theirs[: size * width]
            ours[size * width : bucket * width] = 0
        self.sampled[:size] = accepted.sampled
        self.num_new[:size] = accepted.num_new
        self.step_hidden[: size * width] = hidden
        self.step_hidden[size * width : bucket * width] = 0

    def fill_chain(self, start: ChainStart, bucket: int) -> None:
        """Write where chains start."""
        size = start.at.shape[0]
        for ours, theirs in zip(self.start(size).tensors(), start.tensors(), strict=True):
            ours.copy_(theirs)
        for rest in (self.logits, self.hidden, self.at):
            rest[size:bucket] = 0

    def forget_step(self) -> None:
        """Make all rows those of a step without results."""
        self.num_new.fill_(1)
        for tensor in (self.sampled, self.step_hidden):
            tensor.zero_()

    def start(self, size: int) -> ChainStart:
        """The starts of the first ``size`` chains."""
        return ChainStart(self.logits[:size], self.hidden[:size], self.at[:size])

    def fill_sampling(self, info: SamplingBatchInfo) -> None:
        """Write the sampling parameters of tokens and draft tokens, unless they are there already."""
        if info is self._filled:
            return
        size = info.temperatures.shape[0]
        for name, ours in self._columns.items():
            ours[:size] = getattr(info, name)
        self._filled = info

    def sampling_info(self, size: int, greedy: bool) -> SamplingBatchInfo:
        """Sampling info that reads these tensors: all rows greedy, or each by its parameters."""
        return SamplingBatchInfo(
            **{name: column[:size] for name, column in self._columns.items()},
            is_all_greedy=greedy,
            need_top_p_sampling=not greedy,
            need_top_k_sampling=not greedy,
            need_min_p_sampling=not greedy,
            vocab_size=self.vocab_size,
            is_any_greedy=True,
        )

    def fill_sampling_at_random(self, size: int, generator: torch.Generator) -> None:
        """Parameters of ``size`` requests of all kinds, for the check of captured steps."""
        self._filled = None
        # Whole numbers from the first to below the second, over the third.
        for name, low, high, over in (
            ("temperatures", 5, 15, 10), ("top_ps", 5, 11, 10), ("min_ps", 0, 2, 100),
            ("top_ks", 1, self.vocab_size + 1, 1), ("sampling_seed", 0, 1 << 40, 1), ("greedy_rows", 0, 2, 1),
        ):  # fmt: skip
            column = self._columns[name][:size]
            drawn = torch.randint(low, high, column.shape, generator=generator)
            column.copy_(drawn if over == 1 else drawn / over)

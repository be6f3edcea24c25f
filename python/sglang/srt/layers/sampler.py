"""From logits to token ids: edits, greedy or seeded choice, log-probabilities of what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from sglang.kernels.ops.sampling.check_ids import check_ids
from sglang.kernels.ops.sampling.draw import draw
from sglang.kernels.ops.sampling.greedy import fits_aiter, greedy_aiter, greedy_sample, greedy_torch
from sglang.srt.distributed.parallel_state import get_tp_group, is_dp_attention_enabled
from sglang.srt.layers.logits_processor import LogitsProcessorOutput
from sglang.srt.layers.logprobs import ChosenIds, RowLogprobs, best_entries
from sglang.srt.sampling.host_edits import HostEdits
from sglang.srt.sampling.logit_edits import LogitEdits
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.server_args import get_global_server_args

# The last three are not used here: AITER's registered test replaces them under these names, with the two below.
__all__ = ["Sampler", "get_global_server_args", "get_tp_group", "is_dp_attention_enabled"]

# True and a kernel, or False, go past the op table; None leaves the choice to it (SGLANG_USE_AITER, HIP, shapes).
_use_aiter: bool | None = None
_aiter_greedy_sample: Callable[[torch.Tensor, torch.Tensor], None] | None = None


class Sampler(torch.nn.Module):
    """Chooses the next token of each row.

    A row from which nothing can be sampled gets a ``RowFault`` in ``logits_output.row_faults``: its logits (raw or
    edited) contain NaN or +inf, none of them is finite, or the kernel returned a value that is not a token id. Such a
    row gets some id in range, so that the device can continue, and the scheduler ends its request with an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._chosen = ChosenIds()

    def forward(
        self,
        logits_output: LogitsProcessorOutput,
        sampling_info: SamplingBatchInfo,
        return_logprob: bool = False,
        top_logprobs_nums: Sequence[int] = (),
        token_ids_logprobs: Sequence[Sequence[int] | None] = (),
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``next_token_ids`` [B] from ``logits_output.next_token_logits`` [B, V] float; int64, AITER's are int32.

        ``positions`` [B] int64 is the index in its sequence of the token to be sampled; needed unless all rows are
        greedy. With ``return_logprob`` the output's ``row_logprobs`` are natural-log probabilities under the model's
        own distribution (before penalties and temperature). Nothing here waits for the device.
        """
        raw = logits_output.next_token_logits
        chosen, faults = _choose(raw, sampling_info, positions)
        ids, logits_output.row_faults = check_ids(chosen, faults, raw.shape[-1])
        if return_logprob:
            logprobs = torch.log_softmax(raw, dim=-1, dtype=torch.float32)
            logits_output.row_logprobs = RowLogprobs(
                token=logprobs.gather(1, ids.to(torch.int64).unsqueeze(1)).squeeze(1),
                top=best_entries(logprobs, top_logprobs_nums),
                top_counts=top_logprobs_nums,
                chosen=self._chosen.entries(logprobs, token_ids_logprobs),
                chosen_ids=[row or () for row in token_ids_logprobs],
            )
        return ids

    def draft(
        self, logits: torch.Tensor, sampling_info: SamplingBatchInfo, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """The ids [B] int64 of ``forward``, of rows [B, V] whose faults nobody asks for."""
        drawn, _ = _choose(logits, sampling_info, positions)
        return drawn.clamp(0, logits.shape[-1] - 1).to(torch.int64)


def _choose(
    raw: torch.Tensor, info: SamplingBatchInfo, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and faults of rows, [B] each."""
    if isinstance(info.edits, HostEdits):
        return info.edits.drawn(raw, lambda edited: _pick(edited, info, positions))
    return _pick(raw, info, positions)


def _pick(
    logits: torch.Tensor, info: SamplingBatchInfo, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of rows that have a host's edits already; ids are int64, AITER's int32."""
    if not info.is_all_greedy or info.vocab_mask is not None or isinstance(info.edits, LogitEdits):
        return _draw(logits, info, positions)
    if _use_aiter is None:
        return greedy_sample(logits)
    return greedy_aiter(logits, _aiter_greedy_sample) if _use_aiter and fits_aiter(logits) else greedy_torch(logits)


def _draw(
    raw: torch.Tensor, info: SamplingBatchInfo, positions: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and faults of rows of any kind, [B] int64 each."""
    assert positions is not None or info.is_all_greedy, "random sampling needs positions"
    edits = info.edits
    edited: tuple[torch.Tensor | None, ...] = ()
    if isinstance(edits, LogitEdits):
        edited = (edits.rows, edits.marks, edits.penalties, edits.left, edits.bias)
    columns = (column.view(-1) for column in (info.temperatures, info.top_ks, info.top_ps, info.min_ps))
    return draw(raw, *columns, info.greedy_rows, info.sampling_seed, positions, info.wanted, info.vocab_mask, *edited)

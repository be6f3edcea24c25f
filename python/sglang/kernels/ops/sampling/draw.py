"""The next token of each row: edits, allowed ids, temperature, filters and the draw, over whole vocabularies."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sglang.kernels.launch import FLOATS, cdiv, next_power_of_2, triton_impl
from sglang.kernels.ops.sampling.greedy import LOGITS_FAULT
from sglang.kernels.ops.sampling.seeded import seeded_sample_torch
from sglang.kernels.spec import Impl, Op
from sglang.srt.platforms import current_platform

# A mark of an id: how often it is in the output, whether it is in prompt or output, whether it ends the request.
COUNT, SEEN, STOP = (1 << 29) - 1, 1 << 29, 1 << 30
# Why nothing can be drawn from a row whose logits are sound: what edits, mask and temperature make of them.
EDITED_FAULT = 2

# Scores that one program of the Triton form reads, room for those of a row that are in a bracket, one in how many is
# sampled, programs per row, scores side by side that one thread reads at once, and threads of four warps or waves.
BLOCK, FOUND, STRIDE, MAX_CHUNKS, WIDE = 4096, 16384, 16, 128, 4
LANES = {"hip": 256}
# Scores that are sorted before it is known that a filter reaches further.
FEW = 1024


class Wanted(NamedTuple):
    """What the rows of the batch need, known on the host: what no row needs is not computed."""

    draws: bool = True
    greedy: bool = False
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False

    @property
    def filters(self) -> bool:
        """Whether any id may be left out."""
        return self.draws and (self.top_k or self.top_p or self.min_p)


def edit_logits_torch(
    logits: Tensor, edit_rows: Tensor, marks: Tensor, penalties: Tensor, left: Tensor, bias: Tensor | None
) -> Tensor:
    """Penalties, bias and forbidden stop ids, on a copy of the rows that have any.

    logits [B, V] float; edit_rows [B] int32: the row of the other tensors, -1 for none; marks [P, V] int32 (``COUNT``,
    ``SEEN``, ``STOP``); penalties [P, 3] float32: frequency, presence, repetition; left [P] int32: while positive, ids
    marked ``STOP`` get -inf; bias [P, V] float32 -> [B, V] float32. Repetition: divide positive, multiply negative
    logits of seen ids (Keskar et al. 2019, CTRL). Frequency and presence: subtract ``frequency * count + presence``
    where the count is not 0 (OpenAI's definition).
    """
    edit = edit_rows.clamp(min=0).long()
    x, mark = logits.float(), marks[edit]
    frequency, presence, repetition = penalties[edit].unsqueeze(-1).unbind(1)
    x = torch.where((mark & SEEN) != 0, torch.where(x > 0, x / repetition, x * repetition), x)
    count = mark & COUNT
    x = torch.where(count > 0, x - (frequency * count + presence), x)
    if bias is not None:
        x = x + bias[edit]
    x = x.masked_fill(((mark & STOP) != 0) & (left[edit].unsqueeze(1) > 0), -math.inf)
    return torch.where((edit_rows >= 0).unsqueeze(1), x, logits)


def allow_torch(logits: Tensor, allowed: Tensor) -> Tensor:
    """-inf for ids that are not allowed; allowed [B, ceil(V / 32)] int32: bit i % 32 of word i // 32 is id i."""
    vocab = logits.shape[1]
    if allowed.device.type == "cpu":  # where numpy takes half the time
        words = np.ascontiguousarray(~allowed.numpy(), dtype="<i4").view(np.uint8)
        forbidden = torch.from_numpy(np.unpackbits(words, axis=1, count=vocab, bitorder="little")).view(torch.bool)
    else:
        bits = (allowed.unsqueeze(2) >> torch.arange(32, dtype=torch.int32, device=logits.device)) & 1
        forbidden = bits.flatten(1)[:, :vocab] == 0
    return logits.masked_fill(forbidden, -math.inf)


def _best_scores(scores: Tensor, probs_top: Tensor, top_ks: Tensor, top_ps: Tensor) -> Tensor:
    """The largest scores of each row, descending: as many as any row's filter may keep."""
    vocab = scores.shape[1]
    if scores.device.type == "cpu" and vocab > 4 * FEW:
        best = scores.topk(FEW, dim=-1).values
        mass = torch.exp(best - best[:, :1]).double().sum(-1, keepdim=True) * probs_top
        enough = torch.where(top_ks < vocab, top_ks <= FEW, (top_ps >= 1.0) | (mass >= top_ps + 1e-6))
        if bool(enough.all()):
            return best
    return scores.sort(dim=-1, descending=True).values


def filter_torch(scores: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, wanted: Wanted) -> Tensor:
    """Probabilities [B, V] float32 of ``scores`` [B, V] after top-k, then top-p, then min-p; removed ids get 0.

    top_ks [B] integer (below 1 or above V: all), top_ps, min_ps [B] float32. Top-k and top-p keep the largest scores,
    ties in id order; top-p keeps the shortest such list whose sum reaches p (after top-k and renormalised), at least
    one id, and all from p = 1 on; min-p drops ids below ``min_p * max``. Rows are not renormalised at the end.
    """
    probs = torch.softmax(scores, dim=-1)
    if not wanted.filters:
        return probs
    top = probs.amax(dim=-1, keepdim=True)
    filtered = probs.masked_fill(probs < min_ps.unsqueeze(1) * top, 0.0) if wanted.min_p else probs
    if not (wanted.top_k or wanted.top_p):
        return filtered
    vocab, top_ks, top_ps = scores.shape[1], top_ks.long().unsqueeze(1), top_ps.unsqueeze(1)
    top_ks = torch.where((top_ks < 1) | (top_ks > vocab), vocab, top_ks)
    ordered = _best_scores(scores, top, top_ks, top_ps)
    ends = torch.exp(ordered - ordered[:, :1]).cumsum(-1, dtype=torch.float64)
    most = top_ks.clamp(max=ordered.shape[1])
    total = torch.where(top_ks < vocab, ends.gather(1, most - 1), 1.0 / top.double())
    # As many as have less than p before them.
    number = torch.searchsorted(ends, top_ps * total) + 1
    number = torch.where(top_ps < 1.0, number.clamp(max=most), most)
    cut = torch.where((top_ks >= vocab) & (top_ps >= 1.0), -math.inf, ordered.gather(1, number - 1))
    inside = scores >= cut
    filtered = filtered.masked_fill(~inside, 0.0)
    # Ties of the lowest kept score, the last of which may not be kept. A host can look; on a device that is a wait.
    if scores.device.type != "cpu" or bool((inside.sum(-1, keepdim=True) > number).any()):
        above = (scores > cut).sum(-1, keepdim=True)
        tied = scores == cut
        past = tied & (tied.cumsum(-1, dtype=torch.int32) + above > number) & (cut > -math.inf)
        filtered = filtered.masked_fill(past, 0.0)
    return filtered


def draw_torch(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, greedy: Tensor | None,
    seeds: Tensor | None, positions: Tensor | None, wanted: Wanted, allowed: Tensor | None = None,
    edit_rows: Tensor | None = None, marks: Tensor | None = None, penalties: Tensor | None = None,
    left: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The next id of each row, and why it has none.

    logits [B, V] float; temperatures, top_ps, min_ps [B] float32; top_ks [B] integer; greedy [B] bool: rows that take
    the first of their largest scores, to be given temperature 1; seeds, positions [B] integer (index of the token to be
    drawn), these three None where no row draws; allowed as ``allow_torch`` says, the last five as ``edit_logits_torch``
    does.
    Edits come first, then the mask, the temperature, the filters and ``seeded_sample_torch``. Returns ids [B] int64 in
    [0, V) and faults [B] int64: ``LOGITS_FAULT`` where the row holds NaN, +inf or nothing finite, ``EDITED_FAULT``
    where what it is drawn from does, else 0. The id of a row with a fault has no meaning. Another implementation may
    answer another id where draw or cut is within 1e-6 of the row's mass from where the id would change.
    """
    edited = logits.float()
    if edit_rows is not None:
        assert marks is not None and penalties is not None and left is not None
        edited = edit_logits_torch(logits, edit_rows, marks, penalties, left, bias)
    if allowed is not None:
        edited = allow_torch(edited, allowed)
    scores = edited / temperatures.unsqueeze(1) if wanted.draws else edited
    raw, first = logits.amax(dim=-1), None
    if wanted.greedy or not wanted.draws:
        best, first = scores.max(dim=-1)  # the first of the largest
    else:
        # Division keeps the order, so that the largest quotient is that of the largest logit.
        best = raw / temperatures if edit_rows is None and allowed is None else scores.amax(dim=-1)
    # NaN and infinities alike are not below infinity.
    faults = torch.where(best.abs() < math.inf, 0, EDITED_FAULT)
    faults = torch.where(raw.abs() < math.inf, faults, LOGITS_FAULT)
    if not wanted.draws:
        assert first is not None
        return first, faults
    assert greedy is not None and seeds is not None and positions is not None
    ids = seeded_sample_torch(filter_torch(scores, top_ks, top_ps, min_ps, wanted), seeds, positions)
    ids = ids.clamp(max=logits.shape[1] - 1)  # a row of NaN has no last id
    return ids if first is None else torch.where(greedy, first, ids), faults


def draw_triton(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor, greedy: Tensor | None,
    seeds: Tensor | None, positions: Tensor | None, wanted: Wanted, allowed: Tensor | None = None,
    edit_rows: Tensor | None = None, marks: Tensor | None = None, penalties: Tensor | None = None,
    left: Tensor | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from sglang.kernels.ops.sampling import draw_triton as body

    rows, vocab = logits.shape
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    faults = torch.empty_like(ids)
    if rows == 0:
        return ids, faults
    sizes = _sizes(vocab)
    chunks, slots = cdiv(vocab, sizes["BLOCK"]), (rows, sizes["CHUNKS"])
    # Each part at a multiple of 16 bytes, for which kernels are compiled whatever the number of rows.
    scratch = torch.empty(4, rows * max(4, sizes["CHUNKS"]), dtype=torch.int32, device=logits.device)
    firsts, (tops, raws, sums) = scratch[0], scratch[1:].view(torch.float32)
    # None of the edits are compiled in, or all, and the same of filters: so kernels are few, and warm-up has them all.
    # For what is absent the kernels get scratch, of which they use nothing.
    ints, floats = [firsts if x is None else x for x in (allowed, edit_rows, marks, left)], [penalties, bias]
    penalties, bias_rows = (tops if x is None else x for x in floats)
    source = (logits, temperatures, *ints[:3], penalties, ints[3], bias_rows)
    words, edits = 0 if allowed is None else cdiv(vocab, 32), int(edit_rows is not None)
    shape = (vocab, logits.stride(0), words, edits, int(bias is not None), chunks)
    edited = bool(words or edits)
    samples = state = found = counts = above = floored = None
    cap = sizes.pop("CAP")
    if wanted.filters:
        samples = logits.new_empty(*slots, sizes["BLOCK"] // sizes["STRIDE"], dtype=torch.float32)
        found = logits.new_empty(*slots, cap, dtype=torch.float32)
        per_chunk = torch.empty(3, scratch.shape[1], dtype=torch.float32, device=logits.device)
        counts, above, floored = per_chunk[0].view(torch.int32), per_chunk[1], per_chunk[2]
        state = logits.new_empty(rows, 4, dtype=torch.float32)
    grid = (rows * chunks,)
    body.scan_kernel[grid](
        *source, *shape, tops, firsts, raws, sums, samples, EDITED=edited, FILTER=wanted.filters, **sizes,
        HALVINGS=min(WIDE, sizes["STRIDE"]).bit_length() - 1, num_warps=4,
    )  # fmt: skip
    stride = sizes.pop("STRIDE")
    if wanted.filters:
        body.bracket_kernel[(rows,)](
            temperatures, tops, sums, samples, top_ks, top_ps, min_ps, greedy, state, vocab, chunks,
            **sizes, STRIDE=stride, WHOLE=cap == sizes["BLOCK"], num_warps=8,
        )  # fmt: skip
        body.sift_kernel[grid](
            *source, *shape, tops, state, found, counts, above, floored, EDITED=edited, **sizes,
            CAP=cap, LANES=min(LANES.get(current_platform.kind, 128), sizes["BLOCK"]), num_warps=4,
        )  # fmt: skip
    body.pick_kernel[(rows,)](
        *source, *shape, top_ks, top_ps, min_ps, greedy, seeds, positions,
        tops, firsts, raws, sums, state, found, counts, above, floored, ids, faults,
        EDITED=edited, DRAWS=wanted.draws, FILTER=wanted.filters, **sizes, CAP=cap,
        num_warps=16 if wanted.filters else 8,
    )  # fmt: skip
    return ids, faults


def _sizes(vocab: int) -> dict[str, int]:
    """Scores of a chunk, chunks of a row (rounded up), one score in how many is sampled, scores kept of a chunk."""
    block = min(BLOCK, next_power_of_2(vocab))
    chunks = next_power_of_2(cdiv(vocab, block))
    return {"CHUNKS": chunks, "BLOCK": block, "STRIDE": min(STRIDE, block), "CAP": min(block, max(16, FOUND // chunks))}


def _accepts(logits: Tensor, *others: Tensor | Wanted | None) -> bool:
    tensors = [other for other in others if isinstance(other, Tensor)]
    readable = logits.dtype in FLOATS and logits.stride(1) == 1 and all(other.is_contiguous() for other in tensors)
    return readable and 0 < logits.shape[1] <= BLOCK * MAX_CHUNKS


draw = Op("sampling.draw", triton_impl(draw_triton, _accepts), Impl("torch", draw_torch))

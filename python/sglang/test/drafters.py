"""Drafters for tests and benchmarks: a rule makes the draft tokens, not a model; it may use the known output."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import torch

from sglang.srt.managers.req_memory import ReqMemory
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.model_executor.model_runner import StepForward
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.speculative.eagle_worker import Drafter
from sglang.srt.speculative.verify import Accepted

# From the tokens of a request so far to ``n`` draft tokens.
Rule = Callable[[Req, Sequence[int], int], Sequence[int]]


class RuleDrafter(Drafter):
    """Makes the drafts of each request by ``rule``, and counts how many are accepted."""

    def __init__(self, memory: ReqMemory, rule: Rule, num_steps: int) -> None:
        self.rule = rule
        self.num_steps = num_steps
        # Verify steps of requests by the number of tokens that they gave.
        self.num_by_length = [0] * (num_steps + 2)
        self._owners: dict[int, Req] = {}
        admit = memory.admit

        def watched(req: Req, match: object) -> None:
            admit(req, match)  # type: ignore[arg-type]
            assert req.req_pool_idx is not None
            self._owners[req.req_pool_idx] = req

        memory.admit = watched  # type: ignore[method-assign]

    def propose(self, step: StepForward, accepted: Accepted, info: SamplingBatchInfo) -> torch.Tensor:
        """See the base class."""
        self.follow(step, accepted)
        drafts = []
        counts = accepted.num_new.tolist()
        for row, sampled, count in zip(step.req_rows.tolist(), accepted.sampled.tolist(), counts, strict=True):
            req = self._owners[row]
            known = [*req.origin_input_ids, *req.output_ids, *sampled[:count]]
            guesses = list(self.rule(req, known, self.num_steps))
            assert len(guesses) == self.num_steps
            drafts.append(guesses)
        return torch.tensor(drafts, dtype=torch.int64, device=accepted.sampled.device).view(-1, self.num_steps)

    def follow(self, step: StepForward, accepted: Accepted) -> None:
        """Count the tokens of a verify step."""
        for count in accepted.num_new.tolist() if step.forward_batch.kind is not None else ():
            self.num_by_length[count] += 1

    @property
    def num_accepted(self) -> int:
        """Drafts that were accepted."""
        return sum((length - 1) * number for length, number in enumerate(self.num_by_length) if length)

    @property
    def num_rejected(self) -> int:
        """Drafts that were not."""
        return sum((self.num_steps + 1 - length) * number for length, number in enumerate(self.num_by_length) if length)


def rules(answers: Mapping[str, Sequence[int]], vocab_size: int, eos: int, error_rate: float = 0.3) -> dict[str, Rule]:
    """Rules by name; ``answers`` are the correct outputs by request id."""

    def right(req: Req, known: Sequence[int], n: int) -> list[int]:
        done = len(known) - len(req.origin_input_ids)
        truth = list(answers[req.rid][done : done + n])
        return truth + [eos] * (n - len(truth))

    def wrong(req: Req, known: Sequence[int], n: int) -> list[int]:
        return [(token + 1) % vocab_size for token in right(req, known, n)]

    def right_at_the_end(req: Req, known: Sequence[int], n: int) -> list[int]:
        return wrong(req, known, n)[:-1] + right(req, known, n)[-1:]

    def wrong_at_the_end(req: Req, known: Sequence[int], n: int) -> list[int]:
        return right(req, known, n)[:-1] + wrong(req, known, n)[-1:]

    def ends(req: Req, known: Sequence[int], n: int) -> list[int]:
        return [eos] * n

    def errant(req: Req, known: Sequence[int], n: int) -> list[int]:
        coins = random.Random(f"{req.rid} {len(known)}")
        return [token if coins.random() > error_rate else coins.randrange(vocab_size) for token in right(req, known, n)]

    return {
        "right": right,
        "wrong": wrong,
        "right at the end": right_at_the_end,
        "wrong at the end": wrong_at_the_end,
        "ends": ends,
        "errant": errant,
    }

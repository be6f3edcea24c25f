"""Counters and log lines of the scheduler, and where its time goes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from sglang.srt.managers.schedule_batch import ScheduleBatch

logger = logging.getLogger(__name__)

# Tokens per verify step below which speculation was slower wherever it was measured: a verify step takes at
# least the time of a decode step, and the drafts take theirs. The earliest gain was at 1.47 (one H200, 2026-11-29,
# Qwen3.5 and DeepSeek V3 layers, batches of 1 to 32, 1 and 3 drafts: bench_speculative).
LOSING_LENGTH = 1.25
# Number of verify steps over which this is decided.
JUDGED_STEPS = 2000


class SchedulerMetrics:
    """Steps, tokens and seconds since start, under the names of /server_info.

    Logs one line per prefill step, and one every ``decode_log_interval`` decode steps.
    """

    def __init__(self, decode_log_interval: int, overlap_trace: Callable[[], list[dict[str, Any]]] = list) -> None:
        self._interval = decode_log_interval
        self._overlap_trace = overlap_trace
        self.num_prefill_steps = 0
        self.num_decode_steps = 0
        self.num_idle_steps = 0  # steps that ran without rows of this group
        self.num_retracted_reqs = 0
        self.num_aborted_reqs = 0
        self.num_prompt_tokens = 0  # of started requests: computed, cached and remaining
        self.num_prefilled_tokens = 0
        self.num_cached_tokens = 0
        self.num_generated_tokens = 0
        # Speculation: verify steps of requests, draft tokens in them, and draft tokens that became output, the latter
        # also by their position in the chain. Draft tokens after the end of an answer do not count as accepted.
        self.spec_verify_ct = 0
        self.num_drafts = 0
        self.num_accepted_drafts = 0
        self.accepted_by_position: list[int] = []
        self.spec_accept_length = 0.0  # tokens per verify step of a request, as last logged; so is the rate of drafts
        self.spec_accept_rate = 0.0
        self.spec_accept_rate_by_position: list[float] = []  # number of steps that accepted at least so many drafts
        self.spec_loses = False  # result of the last decision
        # Seconds in forward and sampling, and in the rest of a step.
        self.forward_seconds = 0.0
        self.schedule_seconds = 0.0
        self.last_gen_throughput = 0.0
        self.cache_hit_rate = 0.0  # of the last prefill step
        self._log_started = time.perf_counter()
        self._log_tokens = 0  # of these counts, what was logged
        self._log_spec = (0, 0, 0)
        self._log_positions: list[int] = []
        self._judged = (0, 0)  # verify steps and accepted drafts
        self._warned = False

    def verified(self, num_drafts: int, num_new: int) -> None:
        """Record a verify step that gave a request ``num_new`` tokens, of which all but the last were drafts."""
        self.spec_verify_ct += 1
        self.num_drafts += num_drafts
        self.num_accepted_drafts += num_new - 1
        self.accepted_by_position += [0] * (num_drafts - len(self.accepted_by_position))
        for place in range(num_new - 1):
            self.accepted_by_position[place] += 1
        if self.spec_verify_ct - self._judged[0] >= JUDGED_STEPS:
            self._judge(num_drafts)

    def _judge(self, num_drafts: int) -> None:
        """Decide whether speculation loses time, by the tokens accepted since the last decision; warns once."""
        steps, accepted = self._judged
        self._judged = now = (self.spec_verify_ct, self.num_accepted_drafts)
        length = 1 + (now[1] - accepted) / (now[0] - steps)
        self.spec_loses = length < LOSING_LENGTH
        if self.spec_loses and not self._warned:
            self._warned = True
            logger.warning(
                "speculation costs more time than it saves: %.2f tokens per step over the last %d steps of requests; "
                "below %.2f a step with %d drafts takes longer than the decode steps that it replaces. Remove "
                "--speculative-algorithm%s; spec_loses in /server_info shows whether this is still so",
                length,
                now[0] - steps,
                LOSING_LENGTH,
                num_drafts,
                "" if num_drafts == 1 else ", or try --speculative-num-steps 1",
            )

    def step_done(
        self, batch: ScheduleBatch, load: Callable[[], dict[str, int]], forward_s: float, schedule_s: float
    ) -> None:
        """Count a step; ``load`` is called if it is logged."""
        self.forward_seconds += forward_s
        self.schedule_seconds += schedule_s
        if batch.forward_mode.is_decode():
            self.num_decode_steps += 1
            if self.num_decode_steps % self._interval == 0:
                self._log_decode(load())
        else:
            self._prefill_done(batch, load())

    def _prefill_done(self, batch: ScheduleBatch, load: dict[str, int]) -> None:
        # What a retracted request computes or finds in the cache again is not counted again.
        spans = zip(batch.reqs, batch.starts, strict=True)
        fresh = [req for req, start in spans if start == req.cached_tokens and req.num_retractions == 0]
        cached = sum(req.cached_tokens for req in fresh)
        self.num_prompt_tokens += sum(len(req.origin_input_ids) for req in fresh)
        self.num_prefill_steps += 1
        for req, start, end in zip(batch.reqs, batch.starts, batch.ends, strict=True):
            # Decoding requests in a mixed step have output tokens, and retracted ones compute output again.
            self.num_prefilled_tokens += max(0, min(end, len(req.origin_input_ids)) - start)
        self.num_cached_tokens += cached
        self.cache_hit_rate = cached / max(1, cached + batch.num_tokens)
        logger.info(
            "Prefill batch. #new-seq: %d, #new-token: %d, #cached-token: %d, %s, #running-req: %d, #queue-req: %d",
            len(batch.reqs),
            batch.num_tokens,
            cached,
            _usage(load),
            load["num_running_reqs"],
            load["num_queue_reqs"],
        )

    def _log_decode(self, load: dict[str, int]) -> None:
        now = time.perf_counter()
        new = self.num_generated_tokens - self._log_tokens
        self.last_gen_throughput = new / max(now - self._log_started, 1e-9)
        self._log_started, self._log_tokens = now, self.num_generated_tokens
        logger.info(
            "Decode batch. #running-req: %d, #token: %d, %s, %sgen throughput (token/s): %.2f, #queue-req: %d",
            load["num_running_reqs"],
            load["num_used_tokens"],
            _usage(load),
            self._log_acceptance(),
            self.last_gen_throughput,
            load["num_queue_reqs"],
        )
        for row in self._overlap_trace():
            logger.info(
                "Overlap of %(site)s at %(num_tokens)d tokens (captured: %(captured)s): side %(side_us).1f us, main "
                "%(main_us).1f us, overlapped fraction of the side %(overlap_fraction).3f, forks %(forks)d",
                row,
            )

    def _log_acceptance(self) -> str:
        """The acceptance since the last log line; "" without speculation."""
        if not self._take_acceptance():
            return ""
        return f"accept len: {self.spec_accept_length:.2f}, accept rate: {self.spec_accept_rate:.2f}, "

    def _take_acceptance(self) -> bool:
        """Update the figures of speculation; False if there was no verify step since the last update."""
        now = (self.spec_verify_ct, self.num_drafts, self.num_accepted_drafts)
        steps, drafts, accepted = (count - before for count, before in zip(now, self._log_spec, strict=True))
        if not steps:
            return False
        before = self._log_positions + [0] * (len(self.accepted_by_position) - len(self._log_positions))
        counts = [count - was for count, was in zip(self.accepted_by_position, before, strict=True)]
        self._log_spec, self._log_positions = now, list(self.accepted_by_position)
        self.spec_accept_length, self.spec_accept_rate = 1 + accepted / steps, accepted / drafts
        self.spec_accept_rate_by_position = [count / steps for count in counts]
        return True

    def went_idle(self) -> None:
        """Do not count idle time into the next throughput figure; update the figures of speculation for the last
        requests."""
        self._take_acceptance()
        self._log_started, self._log_tokens = time.perf_counter(), self.num_generated_tokens

    def snapshot(self) -> dict[str, Any]:
        """For /server_info: every public attribute."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def token_usage(load: Mapping[str, int]) -> dict[str, float]:
    """The fraction of the KV pool that requests hold; with separate window pools the fraction of each."""
    usage = {"token_usage": load.get("num_used_tokens", 0) / max(1, load.get("max_total_num_tokens", 1))}
    if "swa_max_total_num_tokens" in load:
        usage["full_token_usage"] = usage["token_usage"]
        usage["swa_token_usage"] = load["num_used_swa_tokens"] / max(1, load["swa_max_total_num_tokens"])
    return usage


def _usage(load: dict[str, int]) -> str:
    usage = token_usage(load)
    return ", ".join(f"{name.replace('_', ' ')}: {part:.2f}" for name, part in usage.items())

"""The loop of one scheduler process: receive requests, choose a step, run it, send tokens out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sglang.srt.layers.logits_processor import RowFault
from sglang.srt.managers.grammar_manager import GrammarManager
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    FinishReason,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    GrammarReady,
    ProfileReqInput,
    ProfileReqOutput,
    SchedulerMessage,
    ShutdownReq,
    StartedReqs,
    TokenIDOutput,
    TokenizedGenerateReqInput,
)
from sglang.srt.managers.req_memory import ReqMemory
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.managers.schedule_policy import NewTokenRatio, PrefillPlanner, order_waiting, retraction_order
from sglang.srt.managers.scheduler_metrics import SchedulerMetrics
from sglang.srt.managers.step_result import (
    StopChecker,
    abort_reason,
    fault_reason,
    make_output,
    record_input_logprobs,
    record_output_logprobs,
    refusal,
)
from sglang.srt.managers.tp_worker import LaunchedForward, LaunchedStep, LaunchedVerify, StepOutput, TpModelWorker
from sglang.srt.model_executor.forward_batch_info import ForwardMode, ModelWorkerBatch
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

if TYPE_CHECKING:
    from sglang.srt.managers.dp_sync import DpStep, DpStepSync
    from sglang.srt.managers.scheduler_config import SchedulerConfig
    from sglang.srt.managers.scheduler_io import SchedulerChannel

logger = logging.getLogger(__name__)


class Scheduler:
    """Continuous batching over one model replica.

    Every TP rank runs the same loop on the same messages and so makes the same decisions; only rank 0 sends replies.
    With attention data parallelism each group of ranks has its own requests, and ``sync`` keeps the groups in step.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        worker: TpModelWorker,
        memory: ReqMemory,
        channel: SchedulerChannel,
        stop_checker: StopChecker,
        sync: DpStepSync | None = None,
        grammars: GrammarManager | None = None,
    ) -> None:
        if memory.step_width != worker.decode_kind.rows_per_request:
            rows = worker.decode_kind.rows_per_request
            raise ValueError(f"a decode step has {rows} rows per request, but its slots are for {memory.step_width}")
        self.config = config
        self.sync = sync
        self.worker = worker
        self.memory = memory
        self.channel = channel
        self.stop_checker = stop_checker
        self.grammars = grammars or GrammarManager()
        self.profile: Callable[[ProfileReqInput], ProfileReqOutput]  # set where steps can be profiled
        self.metrics = SchedulerMetrics(config.args.decode_log_interval, config.overlap_trace)
        self.waiting_queue: list[Req] = []
        self.chunked_reqs: list[Req] = []
        self.running_reqs: list[Req] = []
        self.new_token_ratio = NewTokenRatio(config.args.schedule_conservativeness)
        self._sampling_info: SamplingBatchInfo | None = None
        self._sampled_reqs: list[Req] = []
        # The step that runs while the next one is prepared. Its prompts are among running or chunked requests already.
        self._in_flight: tuple[ScheduleBatch, LaunchedStep | LaunchedVerify] | None = None
        self._num_received = 0
        self._stopping = False
        self._all_idle = True  # result of the last exchange between the groups
        self._waited_s = 0.0  # time of this step in forward, in sampling, and in waiting for their results

    # The loop

    def event_loop(self, on_turn: Callable[[], None] = lambda: None) -> None:
        """Serve until a ShutdownReq arrives; ``on_turn`` is called in each turn, when idle at least once per second."""
        checked = quiet = True
        while not self._stopping:
            on_turn()
            may_wait = checked and not self.has_work() if self.sync is None else self._all_idle
            messages = self.channel.receive(wait=may_wait)
            for message in messages:
                self._handle(message)
            if self.step():
                checked = quiet = False
            elif self.has_work():
                raise RuntimeError(f"the scheduler is stuck: {self.load()} but no step can be made")
            elif not checked:
                self.memory.check_idle(self.config.deep_pool_check)
                self.metrics.went_idle()
                checked = True
            elif not quiet and may_wait and not messages and self._all_idle:
                # A deep check takes tenths of a second for a million slots, so it runs only after one more quiet turn,
                # and not while other groups wait for this one.
                self.memory.check_idle(deep=self.memory.tree.total_size() <= 1 << 20)
                quiet = True

    def step(self) -> bool:
        """Launch one prefill or decode step and process the result of the step before it; False if nothing to do.

        With overlap, the result of a step is processed while the forward of the next step runs. The next step is
        sampled after that, so that penalties and masks are computed from known tokens only. After a prefill step, only
        another prefill step is launched first: its prompts decode and enter the prefix cache once known to be sound.
        """
        started = time.perf_counter()
        self._waited_s = 0.0
        batch = self._next_batch()
        agreed = None if self.sync is None else self._agree(self.sync, batch)
        if batch is None:
            if agreed is not None and agreed.runs:
                # Experts and collectives of the other groups need this rank.
                self.worker.forward(agreed.of_batch(ModelWorkerBatch.idle(self.worker.decode_kind)))
                self.metrics.num_idle_steps += 1
            return self._drain()
        forward = self._launch(batch, agreed)
        self._drain()
        self._in_flight = batch, self._sample(batch, forward)
        if self.config.args.disable_overlap_schedule:
            self._drain()
        other_s = time.perf_counter() - started - self._waited_s
        self.metrics.step_done(batch, self.load, self._waited_s, other_s)
        return True

    def _agree(self, sync: DpStepSync, batch: ScheduleBatch | None) -> DpStep:
        agreed = sync.exchange(batch, batch is not None or self.has_work(), self._stopping)
        self._all_idle = not agreed.has_work
        self._stopping = agreed.stops
        return agreed

    def _launch(self, batch: ScheduleBatch, agreed: DpStep | None) -> LaunchedForward:
        worker_batch = batch.to_worker_batch() if agreed is None else agreed.of_batch(batch.to_worker_batch())
        for index, (req, end, max_new) in enumerate(zip(batch.reqs, batch.ends, batch.max_new, strict=True)):
            req.kv_committed_len = end
            req.num_in_flight += max_new
            if index < batch.num_prompts:
                (self.running_reqs if max_new else self.chunked_reqs).append(req)
        began = time.perf_counter()
        forward = self.worker.forward(worker_batch)
        self._waited_s += time.perf_counter() - began
        return forward

    def _sample(self, batch: ScheduleBatch, forward: LaunchedForward) -> LaunchedStep | LaunchedVerify:
        """Sample a step whose earlier tokens are all known; requests that ended meanwhile are sampled too."""
        info = self._sampling_info_of(batch)
        info.vocab_mask = self.grammars.mask(batch, self.config.device, forward.drafts)
        began = time.perf_counter()
        launched = forward.sample(info, batch.ends_with if self.sync is None else None)
        self._waited_s += time.perf_counter() - began
        return launched

    def _drain(self) -> bool:
        """Process the result of the step in flight; False when there is none."""
        if self._in_flight is None:
            return False
        batch, launched = self._in_flight
        self._in_flight = None
        began = time.perf_counter()
        output = launched.result()
        self._waited_s += time.perf_counter() - began
        self._process(batch, output)
        return True

    def has_work(self) -> bool:
        return bool(self.waiting_queue or self.chunked_reqs or self.running_reqs or self._in_flight)

    def load(self) -> dict[str, int]:
        """Requests by stage, and tokens held."""
        return {
            "num_running_reqs": len(self.running_reqs) + len(self.chunked_reqs),
            "num_queue_reqs": len(self.waiting_queue) + len(self.grammars.pending),
            "num_grammar_queue_reqs": len(self.grammars.pending),
            **self.memory.load(),
        }

    # Messages

    def _handle(self, message: SchedulerMessage) -> None:
        if isinstance(message, TokenizedGenerateReqInput):
            self._enqueue(message)
        elif isinstance(message, GrammarReady):
            self._queue(self.grammars.take(message.rid))
        elif isinstance(message, AbortReq):
            self._abort(message)
        elif isinstance(message, FlushCacheReqInput):
            self.channel.to_tokenizer(self._flush(message.seq))
        elif isinstance(message, GetInternalStateReq):
            state = {**self.load(), **self.metrics.snapshot(), **({} if message.brief else self.config.describe())}
            self.channel.to_tokenizer(GetInternalStateReqOutput(seq=message.seq, internal_state=state))
        elif isinstance(message, ProfileReqInput):
            self.channel.to_tokenizer(self.profile(message))
        elif isinstance(message, ShutdownReq):
            self._stopping = True

    def _enqueue(self, message: TokenizedGenerateReqInput) -> None:
        params = message.sampling_params
        self._num_received += 1
        try:
            req = Req(message, self.config.seed_of(params, self._num_received), self.config.stop_ids_of(params))
            req.check(self.config.vocab_size)
        except Exception as error:  # no error of one request may reach a step that it shares with others
            logger.exception("request %.64r cannot be served", message.rid)
            reason = abort_reason(f"This request cannot be served: {error}.", 500, "InternalServerError")
            self.metrics.num_aborted_reqs += 1
            self.channel.to_detokenizer(BatchTokenIDOutput(outputs=[refusal(message, reason)]))
            return
        room = self.config.max_req_len - req.seq_len
        req.max_new_tokens = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        if room < 1:
            most = f"this server holds at most {self.config.max_req_len} tokens of one request, its output included."
            self._refuse(req, f"The prompt has {req.seq_len} tokens; {most}", 400)
        elif params.max_new_tokens == 0 and not message.return_logprob:
            req.finish_reason = FinishReason(type="length", length=0)
            self._emit([req])
        elif not self.grammars.hold(req):
            self._queue(req)

    def _queue(self, req: Req | None) -> None:
        """Put a request into the waiting queue, unless it has been aborted meanwhile (None)."""
        if req is not None and req.grammar_error:
            self._refuse(req, f"The output constraint cannot be used: {req.grammar_error}.", 400)
        elif req is not None:
            self.waiting_queue.append(req)

    def _refuse(self, req: Req, message: str, status_code: int) -> None:
        err_type = "BadRequestError" if status_code == 400 else "ServiceUnavailableError"
        req.finish_reason = abort_reason(message, status_code, err_type)
        self.metrics.num_aborted_reqs += 1
        self._emit([req])

    def _abort(self, message: AbortReq) -> None:
        """End matching requests in any queue; their memory is free at once."""
        self._drain()
        for queue in (self.waiting_queue, self.chunked_reqs, self.running_reqs, self.grammars.pending):
            hit = [req for req in queue if message.abort_all or req.rid == message.rid]
            for req in hit:
                queue.remove(req)
                req.finish_reason = abort_reason("The request was aborted.")
                self.memory.release(req, cache=True)
            self.metrics.num_aborted_reqs += len(hit)
            self._emit(hit)

    def _flush(self, seq: int) -> FlushCacheReqOutput:
        self._drain()  # the step in flight may be the last one
        if self.has_work():
            counts = f"{len(self.running_reqs) + len(self.chunked_reqs)} running, {len(self.waiting_queue)} queued"
            return FlushCacheReqOutput(seq=seq, success=False, message=f"The server is busy: {counts}.")
        self.memory.tree.reset()
        self.new_token_ratio.reset()
        logger.info("Cache flushed successfully!")
        return FlushCacheReqOutput(seq=seq, success=True)

    # Choosing a step

    def _next_batch(self) -> ScheduleBatch | None:
        batch = self._plan_prefill()
        if batch is None and self._prompts_in_flight() and self._drain():
            batch = self._plan_prefill()
        if batch is not None:
            return batch
        if self.running_reqs:
            return self._plan_decode()
        if self.chunked_reqs:
            # Several partly computed prompts can block each other; the youngest is retracted.
            self._retract(self.chunked_reqs[-1], self.chunked_reqs)
            return self._plan_prefill()
        return None

    def _plan_prefill(self) -> ScheduleBatch | None:
        if not self.waiting_queue and not self.chunked_reqs:
            return None
        if self.config.args.enable_mixed_chunk:
            self._drain()  # the newest tokens of decoding requests are read on the host
        limits, ratio = self.config.prefill, self.new_token_ratio.value
        planner = PrefillPlanner(self.memory, limits, self.running_reqs, ratio, self._prompts_in_flight())
        held_back = [req for req in self.chunked_reqs if not planner.add_chunked(req)]
        if not held_back:
            order_waiting(self.waiting_queue, self.config.args.schedule_policy, self.memory)
            if rids := planner.take_waiting(self.waiting_queue):
                self.channel.to_tokenizer(StartedReqs(rids=rids, at=time.perf_counter()))
        if not planner.reqs:
            return None
        reqs, ends = planner.reqs, planner.ends
        self.chunked_reqs = held_back
        mode = ForwardMode.EXTEND
        if self.config.args.enable_mixed_chunk and self.running_reqs:
            mode = ForwardMode.MIXED
            self._retract_until_decode_fits(planner.taken())
            reqs, ends = reqs + self.running_reqs, ends + [req.seq_len for req in self.running_reqs]
        slots = self.memory.extend(reqs, ends)
        assert slots is not None, "the planner promised room that the pool does not have"
        return self._batch(mode, reqs, ends, slots, len(planner.reqs))

    def _prompts_in_flight(self) -> list[Req]:
        """Requests of the prefill step whose result is not known."""
        return self._in_flight[0].prompts if self._in_flight else []

    def _plan_decode(self) -> ScheduleBatch | None:
        if self.config.retract_interval and (self.metrics.num_decode_steps + 1) % self.config.retract_interval == 0:
            self._retract_one_for_test()
            if not self.running_reqs:  # the step in flight was the last one of each
                return self._plan_prefill()
        reqs = [req for req in self.running_reqs if not req.will_reach_limit]
        slots = self.memory.extend_step(reqs) if reqs else None
        if reqs and slots is None:
            # Which request to retract depends on which ones have finished, so that must be known first.
            self._drain()
            self._retract_until_decode_fits(0)
            if not self.running_reqs:
                return self._plan_prefill()
            reqs = list(self.running_reqs)
            slots = self.memory.extend_step(reqs)
            assert slots is not None
        if slots is None:
            return None
        self.new_token_ratio.decay()
        ends = [req.kv_committed_len + self.memory.step_width for req in reqs]
        return self._batch(ForwardMode.DECODE, reqs, ends, slots)

    def _batch(
        self, mode: ForwardMode, reqs: list[Req], ends: list[int], slots: torch.Tensor, num_prompts: int = 0
    ) -> ScheduleBatch:
        if mode.is_decode():
            max_new = [self.worker.decode_kind.rows_per_request] * len(reqs)
        else:
            max_new = [int(end == req.planned_len) for req, end in zip(reqs, ends, strict=True)]
        return ScheduleBatch(
            forward_mode=mode,
            reqs=reqs,
            starts=[req.kv_committed_len for req in reqs],
            ends=ends,
            max_new=max_new,
            out_cache_loc=slots,
            kind=self.worker.decode_kind,
            num_prompts=num_prompts,
        )

    def _sampling_info_of(self, batch: ScheduleBatch) -> SamplingBatchInfo:
        """Sampling tensors of the step; reused while the same requests decode."""
        decode = batch.forward_mode.is_decode()
        if decode and self._sampled_reqs == batch.reqs and self._sampling_info is not None:
            return self._sampling_info
        rows = [req.sampling_row() for req in batch.reqs]
        info = SamplingBatchInfo.from_rows(rows, self.config.vocab_size, self.config.device)
        # If a step gives several tokens, logit edits are built from the tokens that the host knows.
        kept = decode and not (batch.kind.rows_per_request > 1 and info.edits_logits())
        self._sampling_info, self._sampled_reqs = (info, batch.reqs) if kept else (None, [])
        return info

    # Retraction

    def _retract(self, req: Req, queue: list[Req]) -> None:
        """Free the memory of ``req`` and put it at the head of the waiting queue; it keeps its output."""
        queue.remove(req)
        self.memory.release(req, cache=True)
        req.num_retractions += 1
        self.waiting_queue.insert(0, req)
        self.metrics.num_retracted_reqs += 1

    def _retract_until_decode_fits(self, other_tokens: int) -> None:
        """Retract running requests until the others can make a decode step in addition to ``other_tokens``."""
        before = len(self.running_reqs)
        while self.running_reqs:
            if self.memory.missing_for_step(self.running_reqs) + other_tokens <= self.memory.room().step_tokens():
                break
            self._retract(retraction_order(self.running_reqs)[0], self.running_reqs)
        left, ratio = len(self.running_reqs), self.new_token_ratio
        if left < before:
            ratio.after_retraction(self.running_reqs)
            text = "KV cache pool is full. Retracted %d requests; #running-req: %d, new token ratio: %.2f"
            logger.info(text, before - left, left, ratio.value)

    def _retract_one_for_test(self) -> None:
        """``SGLANG_TEST_RETRACT``: behave as if the pool were full, while another request can continue."""
        self._drain()
        if len(self.running_reqs) > 1:
            self._retract(retraction_order(self.running_reqs)[0], self.running_reqs)

    # Results

    def _process(self, batch: ScheduleBatch, output: StepOutput) -> None:
        """Apply a step's output; tokens of a request that ended while the step ran are ignored."""
        to_emit: list[Req] = []
        for index, (req, max_new) in enumerate(zip(batch.reqs, batch.max_new, strict=True)):
            req.num_in_flight -= max_new
            if req.finish_reason is not None:
                continue
            num_before = len(req.output_ids)
            fault = self._accept(req, index, max_new, output)
            if max_new > 1 and (num_new := len(req.output_ids) - num_before):
                req.spec_verify_ct += 1
                req.spec_accepted += num_new - 1
                self.metrics.verified(max_new - 1, num_new)
            if fault is not None:
                self._finish(req, fault)
                to_emit.append(req)
                continue
            # Rows after the new tokens computed nothing useful.
            req.kv_committed_len -= max_new - (len(req.output_ids) - num_before)
            # A chunk is shared together with the one after it if that is in flight.
            if index < batch.num_prompts and req.kv_committed_len == batch.ends[index]:
                self.memory.share_prefix(req)
            self.memory.advance(req)
            if max_new and req.is_due(num_before, self.config.args.stream_interval):
                to_emit.append(req)
        self._emit(to_emit)

    def _accept(self, req: Req, index: int, max_new: int, output: StepOutput) -> int | None:
        """Check the request's rows in order and add the token of each, up to the one that ends the request.

        The row of an unfinished prompt shows whether the chunk was sound, because its last token attended to all tokens
        before it. Returns None if the request continues, else the RowFault that ended it, or 0.
        """
        try:
            for number, fault in enumerate(output.row_faults[index]):
                if req.return_logprob and number == 0:
                    sound = record_input_logprobs(req, output.prompt_logprobs.get(index, ()))
                    fault = fault if sound else RowFault.LOGITS
                if fault and (fault == RowFault.LOGITS or (max_new and req.max_new_tokens)):
                    req.finish_reason = fault_reason(req, RowFault(fault))
                    self.metrics.num_aborted_reqs += 1
                    return fault
                if max_new:
                    self._take_in(req, index, number, output)
                if req.finish_reason is not None:
                    return 0
            return None
        except Exception as error:  # ends only this request: the others of the step continue
            logger.exception("request %.64r is ended", req.rid)
            req.end_without_logprobs(abort_reason(f"Processing a token failed: {error}.", 500, "InternalServerError"))
            self.metrics.num_aborted_reqs += 1
            return 0

    def _take_in(self, req: Req, index: int, number: int, output: StepOutput) -> None:
        """Add the step's token ``number`` to the request, which may end with it."""
        if req.max_new_tokens == 0:
            req.finish_reason = FinishReason(type="length", length=0)
            return
        token = output.next_token_ids[index][number]
        if req.first_token_at is None:
            req.first_token_at = time.perf_counter()
        req.output_ids.append(token)
        self.metrics.num_generated_tokens += 1
        if req.return_logprob:
            assert output.logprobs is not None
            record_output_logprobs(req, output.logprobs, index * output.width + number, token)
        req.finish_reason = self.stop_checker.check(req)

    def _finish(self, req: Req, fault: int) -> None:
        """Release a finished request. What a faulty step computed never enters the prefix cache, and what this request
        shared earlier is withdrawn from it."""
        unsound = fault in (RowFault.LOGITS, RowFault.TOKEN_ID)
        if unsound:
            self.memory.withdraw(req)
        self.memory.release(req, cache=not unsound)
        for queue in (self.running_reqs, self.chunked_reqs):
            if req in queue:
                queue.remove(req)

    def _emit(self, reqs: list[Req]) -> None:
        outputs: list[TokenIDOutput] = [make_output(req, is_first=req.num_sent == 0) for req in reqs]
        if outputs:
            self.channel.to_detokenizer(BatchTokenIDOutput(outputs=outputs))

"""An engine without a model: the scheduler's protocol with scripted tokens, and the real detokenizer."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchTokenIDOutput,
    FinishReason,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    ProfileReqInput,
    ProfileReqOutput,
    SchedulerMessage,
    ShutdownReq,
    StartedReqs,
    TokenIDOutput,
    TokenizedGenerateReqInput,
    TokenLogprobs,
)
from sglang.srt.managers.ipc import IpcNames, Receiver, Sender

# Output ids of a request; it is ended at max_new_tokens, at an end token, or by its stop conditions.
Script = Callable[[TokenizedGenerateReqInput], Sequence[int]]


def echo(request: TokenizedGenerateReqInput) -> Sequence[int]:
    """The prompt, repeated."""
    ids = request.input_ids
    return [ids[i % len(ids)] for i in range(request.sampling_params.max_new_tokens or 0)]


@dataclass
class _Running:
    request: TokenizedGenerateReqInput
    script: Sequence[int]
    output_ids: list[int] = field(default_factory=list)
    sent: int = 0


class FakeScheduler:
    """Replies on the real sockets from a thread.

    ``received`` holds every message. ``delay_s`` passes before each token, ``error`` ends every request with that
    reason after its first token. ``frozen`` stops all answers: requests wait and never start.
    """

    def __init__(
        self, names: IpcNames, tokenizer: Any, eos_token_ids: Sequence[int], script: Script = echo, dp_rank: int = 0
    ):
        self.script = script
        self.delay_s = 0.0
        self.error: FinishReason | None = None
        self.frozen = False
        self.num_steps = 0
        self.experts: dict[str, Any] = {}
        self.received: list[Any] = []
        self.running: dict[str, _Running] = {}
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._names = names
        self._receiver: Receiver[SchedulerMessage] = Receiver(names.schedulers[dp_rank], SchedulerMessage)
        self._to_tokenizer = Sender(names.tokenizer)
        self._to_detokenizer = Sender(names.detokenizer)
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self) -> None:
        """Wait for the end of the loop, which a ShutdownReq brings."""
        self._thread.join(60)

    def aborted_rids(self) -> list[str]:
        """Request ids named by the AbortReq messages that have arrived."""
        return [message.rid for message in self.received if isinstance(message, AbortReq)]

    def _loop(self) -> None:
        while True:
            if not self.running or self.frozen:
                self._receiver.wait(0.05)
            for raw in self._receiver.recv_raw_all():
                message = self._receiver.decode(raw)
                self.received.append(message)
                if isinstance(message, ShutdownReq):
                    self._to_detokenizer.send(message)
                    for socket in (self._receiver, self._to_tokenizer, self._to_detokenizer):
                        socket.close()
                    return
                if not self.frozen:
                    self._handle(message)
            if self.frozen or not self.running:
                continue
            time.sleep(self.delay_s)
            self._step()

    def _handle(self, message: Any) -> None:
        if isinstance(message, TokenizedGenerateReqInput):
            self._enqueue(message)
        elif isinstance(message, AbortReq):
            for rid in list(self.running):
                if message.abort_all or rid == message.rid:
                    reason = FinishReason(type="abort", message="The request was aborted.")
                    self._emit([(self.running.pop(rid), reason)])
        elif isinstance(message, FlushCacheReqInput):
            idle = not self.running
            text = "" if idle else f"The server is busy: {len(self.running)} running."
            self._to_tokenizer.send(FlushCacheReqOutput(seq=message.seq, success=idle, message=text))
        elif isinstance(message, ProfileReqInput):
            self._to_tokenizer.send(ProfileReqOutput(seq=message.seq, success=True, message="none"))
        elif isinstance(message, GetInternalStateReq):
            load = {"num_running_reqs": len(self.running), "num_queue_reqs": 0, "num_used_tokens": 0}
            steps = {"num_prefill_steps": 0, "num_decode_steps": self.num_steps}
            state = {**load, **steps, "experts": self.experts}
            self._to_tokenizer.send(GetInternalStateReqOutput(seq=message.seq, internal_state=state))

    def _enqueue(self, request: TokenizedGenerateReqInput) -> None:
        entry = _Running(request, [])
        self._to_tokenizer.send(StartedReqs(rids=[request.rid]))
        entry.script = list(self.script(request))
        if request.sampling_params.max_new_tokens == 0:
            self._emit([(entry, FinishReason(type="length", length=0))])
        else:
            self.running[request.rid] = entry

    def _step(self) -> None:
        self.num_steps += 1
        talk: list[tuple[_Running, FinishReason | None]] = []
        for rid, entry in list(self.running.items()):
            position = len(entry.output_ids)
            entry.output_ids.append(entry.script[position] if position < len(entry.script) else min(self._eos))
            reason = self.error or self._finish_reason(entry)
            if reason is not None:
                del self.running[rid]
            if reason is not None or entry.request.stream:
                talk.append((entry, reason))
        self._emit(talk)

    def _finish_reason(self, entry: _Running) -> FinishReason | None:
        params = entry.request.sampling_params
        last, count = entry.output_ids[-1], len(entry.output_ids)
        if last in params.stop_token_ids or (last in self._eos and not params.ignore_eos):
            return FinishReason(type="stop", matched=last)
        if params.stop and self._tokenizer is not None:
            text = self._tokenizer.decode(entry.output_ids, skip_special_tokens=False)
            for stop in params.stop:
                if stop in text:
                    return FinishReason(type="stop", matched=stop)
        if count >= (params.max_new_tokens or 0):
            return FinishReason(type="length", length=count)
        return None

    def _emit(self, outputs: list[tuple[_Running, FinishReason | None]]) -> None:
        if outputs:
            self._to_detokenizer.send(BatchTokenIDOutput(outputs=[_output(entry, reason) for entry, reason in outputs]))


def fake_logprob(token_id: int) -> float:
    return -(token_id % 7 + 1) / 10


def _logprobs(request: TokenizedGenerateReqInput, ids: Sequence[int], first_is_none: bool) -> TokenLogprobs:
    """``top[i]`` are the token itself and its successors; every named id gets ``fake_logprob`` of itself."""
    logprobs: list[float | None] = [fake_logprob(i) for i in ids]
    top: list[Any] = [[(fake_logprob(i), i + k) for k in range(request.top_logprobs_num)] for i in ids]
    chosen: list[Any] = [[(fake_logprob(i), i) for i in request.token_ids_logprob] for _ in ids]
    if first_is_none and ids:
        logprobs[0] = top[0] = chosen[0] = None
    return TokenLogprobs(
        logprobs=logprobs,
        ids=list(ids),
        top=top if request.top_logprobs_num else [],
        chosen=chosen if request.token_ids_logprob else [],
    )


def _output(entry: _Running, reason: FinishReason | None) -> TokenIDOutput:
    request, params = entry.request, entry.request.sampling_params
    new = entry.output_ids[entry.sent :]
    prompt = None
    if request.return_logprob and entry.sent == 0 and request.logprob_start_len >= 0:
        start = request.logprob_start_len
        prompt = _logprobs(request, request.input_ids[start:], first_is_none=start == 0)
    entry.sent = len(entry.output_ids)
    return TokenIDOutput(
        rid=request.rid,
        output_ids=new,
        finish_reason=reason,
        prompt_tokens=len(request.input_ids),
        completion_tokens=len(entry.output_ids),
        cached_tokens=1,
        skip_special_tokens=params.skip_special_tokens,
        no_stop_trim=params.no_stop_trim,
        stop=params.stop,
        input_logprobs=prompt,
        output_logprobs=_logprobs(request, new, first_is_none=False) if request.return_logprob else None,
    )


class FakeEngine:
    """Fake schedulers and the real detokenizer in threads, with the interface of ``EngineProcesses``.

    Set ``dead`` to a text to play a child process that ended, ``asked`` to True for one that got a SIGTERM,
    ``stall`` to a text for one that makes no progress.
    """

    def __init__(
        self,
        server_args: Any,
        tokenizer: Any,
        eos_token_ids: Sequence[int] = (1,),
        script: Script = echo,
        dp_size: int = 1,
    ):
        self.ipc = IpcNames.create(dp_size)
        self.scheduler_info = {"max_total_num_tokens": 4096, "max_req_input_len": 4096}
        self.processes: list[Any] = []
        self.dead: str | None = None
        self.asked = False
        self.stall: str | None = None
        detokenizer_args = types.SimpleNamespace(
            skip_tokenizer_init=tokenizer is None, tokenizer_path=server_args.tokenizer_path, model_path=""
        )
        self._detokenizer = DetokenizerManager(detokenizer_args, self.ipc)  # type: ignore[arg-type]
        self._detokenizer_thread = threading.Thread(target=self._detokenizer.event_loop, daemon=True)
        self.schedulers = [FakeScheduler(self.ipc, tokenizer, eos_token_ids, script, rank) for rank in range(dp_size)]
        self.scheduler = self.schedulers[0]
        for scheduler in self.schedulers:
            scheduler.start()
        self._detokenizer_thread.start()

    def check_alive(self) -> str | None:
        return self.dead

    def stalled(self, most_s: float) -> str | None:
        return self.stall

    def is_asked_to_end(self) -> bool:
        return self.asked

    def shutdown(self, grace_s: float = 5.0) -> None:
        """End both threads and remove the sockets; safe to call twice."""
        if self._detokenizer_thread.is_alive():
            for address, scheduler in zip(self.ipc.schedulers, self.schedulers, strict=True):
                sender = Sender(address)
                sender.send(ShutdownReq())
                scheduler.join()
                sender.close()
            self._detokenizer_thread.join(grace_s)
            self._detokenizer.close()
        self.ipc.remove()

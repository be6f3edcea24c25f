"""Between the API and the scheduler: tokenizes and checks requests, and passes results to the callers that wait for
them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio

from sglang.srt.managers.admission import Admission, Place
from sglang.srt.managers.dp_routing import LoadBalancer
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchStrOutput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GenerateReqInput,
    GetInternalStateReq,
    ProfileReqInput,
    ProfileReqOutput,
    StartedReqs,
    TokenizedGenerateReqInput,
    TokenizerMessage,
)
from sglang.srt.managers.ipc import AsyncReceiver, IpcNames, Sender
from sglang.srt.managers.prompt_text import PromptEncoder
from sglang.srt.managers.request_fields import UnknownFields
from sglang.srt.managers.request_grammar import RequestGrammars
from sglang.srt.managers.request_input import (
    RequestError,
    SingleRequest,
    check_logprobs,
    longer_than_context,
    num_prompt_logprobs,
    out_of_time,
    overloaded,
    split_request,
    time_limit,
    too_many_logprobs,
)
from sglang.srt.managers.request_log import RequestLog
from sglang.srt.managers.request_metrics import RequestMetrics
from sglang.srt.managers.request_state import RequestGroup, RequestState
from sglang.srt.sampling.sampling_params import SamplingParams, SamplingParamsError
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.srt.utils.limits import MAX_PROMPT_LOGPROBS_PER_CALL, SHUTDOWN_RETRY_AFTER_S

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 60.0
PROFILE_TIMEOUT_S = 600.0  # writing a trace of many steps takes long
_FLUSH_POLL_S = 0.1
_SAMPLING_FIELDS = frozenset(SamplingParams.__struct_fields__)


class TokenizerManager:
    """Requests in flight, and the sockets to and from the engine's processes.

    All methods belong to one asyncio loop. ``failure`` is set once, when the engine is gone: every request from then
    on, and every request in flight, ends with it.
    """

    def __init__(self, server_args: ServerArgs, model_config: ModelConfig, tokenizer: Tokenizer | None, ipc: IpcNames):
        self.server_args = server_args
        self.tokenizer = tokenizer
        self.context_len = model_config.context_len
        self.vocab_size = model_config.vocab_size
        self._encoder = None if tokenizer is None else PromptEncoder(tokenizer, self.context_len, self.vocab_size)
        self._grammars = RequestGrammars(server_args, tokenizer, self.vocab_size)
        self.failure: RequestError | None = None
        self._admits = True
        self.last_output_time = 0.0  # of any request
        # Most prompts times samples of one call; None for the offline engine.
        self.max_requests_per_call: int | None = None
        self.unknown_fields = UnknownFields()
        self._log = RequestLog(server_args)
        # Calls that ended at their time limit.
        self.num_timed_out = 0
        self.admission = Admission(server_args.max_queued_requests, server_args.max_queued_tokens)
        # Bound before anyone connects, so that it cannot fail later for lack of file descriptors.
        self._receiver: AsyncReceiver[TokenizerMessage] = AsyncReceiver(ipc.tokenizer, TokenizerMessage)
        self._senders = [Sender(address) for address in ipc.schedulers]
        # By DP rank.
        self.request_metrics = [RequestMetrics() for _ in self._senders]
        self._balancer = LoadBalancer(server_args.load_balance_method, len(self._senders))
        self._receive_task: asyncio.Task[None] | None = None
        self._states: dict[str, RequestState] = {}
        # Calls whose prompts are not sent yet, and the beginnings of ids that were aborted meanwhile.
        self._preparing: dict[RequestGroup, set[str]] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._counter = itertools.count()
        # Grows to the vocabulary at most.
        self._token_texts: dict[int, str] = {}

    async def start(self) -> None:
        """Read the inbox in the running loop."""
        self._receiver.start()
        self._receive_task = asyncio.create_task(self._receive_loop())

    def stop_admission(self) -> None:
        """Refuse requests from now on; those in flight continue."""
        self._admits = False

    def check_room(self) -> None:
        """Raise RequestError (503) if every request would be refused."""
        if not self._admits:
            raise self.shutdown_error("it takes no new requests")
        self.admission.check_room()

    @staticmethod
    def shutdown_error(what: str) -> RequestError:
        """503: another server may take the request."""
        return overloaded(f"The server is shutting down: {what}.", SHUTDOWN_RETRY_AFTER_S)

    async def close(self) -> None:
        """Fail what is in flight and close the sockets."""
        self.fail(self.shutdown_error("the request was ended"))
        if self._receive_task is not None:
            self._receive_task.cancel()
            await asyncio.gather(self._receive_task, return_exceptions=True)
        self.close_sockets()

    def close_sockets(self) -> None:
        """For a manager that was never started."""
        self._receiver.close()
        for sender in self._senders:
            sender.close()
        if self._encoder is not None:
            self._encoder.close()
        self._grammars.close()

    @property
    def num_in_flight(self) -> int:
        return len(self._states)

    def fail(self, error: RequestError) -> None:
        """End every request, present and future, with ``error``."""
        self.failure = self.failure or error
        for state in list(self._states.values()):
            state.group.fail(error)
        for future in self._replies.values():
            if not future.done():
                future.set_exception(error)

    async def generate_request(
        self,
        obj: GenerateReqInput,
        incremental: bool | None = None,
        warnings: Sequence[str] = (),
        is_bounded: bool = True,
        place: Place | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Results of ``obj``: one item (a list for a batch), or, streaming, one dictionary each time a request grows.

        ``incremental`` makes streamed dictionaries contain only what is new; None follows the server's setting.
        ``warnings`` are shown if ``obj`` asks for warnings. ``is_bounded`` False ignores a full queue and has no time
        limit; ``place`` is returned in exchange for those that the request needs. Closing the iterator aborts what is
        unfinished. Raises RequestError.
        """
        incremental = self.server_args.incremental_streaming_output if incremental is None else incremental
        if not self._admits:
            raise self.shutdown_error("it takes no new requests")
        group = RequestGroup(bool(obj.stream))
        if obj.return_warnings:
            group.warnings = list(warnings)
        timeout_s = time_limit(obj.request_timeout, self.server_args.request_timeout) if is_bounded else None
        began = asyncio.get_running_loop().time()
        aborted = self._preparing[group] = set() if place is None else place.aborted
        try:
            # Before Python 3.12 asyncio.wait_for loses a cancellation that comes together with the result.
            with anyio.fail_after(timeout_s):
                tokenized, is_list = await self._prepare(obj, group, is_bounded, place)
        except TimeoutError:
            self.num_timed_out += 1
            raise out_of_time(timeout_s) from None
        finally:
            del self._preparing[group]
        timer = None
        try:
            if timeout_s is not None:
                timer = asyncio.get_running_loop().call_at(began + timeout_s, self._expire, group, timeout_s)
            if self.failure is not None:
                raise self.failure
            self._log.received(obj, group.states)
            # Sent together, the requests of one batch share their first step.
            by_rank: list[list[TokenizedGenerateReqInput]] = [[] for _ in self._senders]
            for state, request in zip(group.states, tokenized, strict=True):
                self._states[state.wire_rid] = state
                dp_rank = self._balancer.assign(state.num_tokens)
                state.sent_to(dp_rank, self.request_metrics[dp_rank] if self.server_args.enable_metrics else None)
                by_rank[state.dp_rank].append(request)
            for sender, requests in zip(self._senders, by_rank, strict=True):
                if requests:
                    sender.send(*requests)
            for state in group.states:
                if state.rid.startswith(tuple(aborted)):
                    self._abort(state)
            if not group.stream:
                await group.wait()
                results = [state.result(incremental=False) for state in group.states]
                yield results if is_list else results[0]
                return
            while not group.all_read:
                for state in await group.wait():
                    result = state.result(incremental)
                    if is_list:
                        result["index"] = state.index
                    yield result
        finally:
            if timer is not None:
                timer.cancel()
            self._release(group)

    def _expire(self, group: RequestGroup, timeout_s: float | None) -> None:
        """End a group whose time is up, even if nobody reads its results."""
        if group.is_finished:
            return
        self.num_timed_out += 1
        group.fail(out_of_time(timeout_s))
        self._abandon(group)

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End requests whose ids start with ``rid``, or all. Raises RequestError if neither is given."""
        if not rid and not abort_all:
            raise RequestError("Give rid, a prefix of the ids of the requests to abort, or abort_all: true.")
        for aborted in (*self._preparing.values(), *(place.aborted for place in self.admission.places)):
            aborted.add("" if abort_all else rid)
        if abort_all:
            for sender in self._senders:
                sender.send(AbortReq(abort_all=True))
            return
        for state in self._states.values():
            if state.rid.startswith(rid):
                self._abort(state)

    def _abort(self, state: RequestState) -> None:
        self._senders[state.dp_rank].send(AbortReq(rid=state.wire_rid))

    async def flush_cache(self, timeout_s: float = 0.0) -> tuple[bool, str]:
        """Drop the prefix cache; waits up to ``timeout_s`` for requests in flight. Returns success and why not."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            # While this process has requests in flight, the answer is known without asking the schedulers.
            if not self._states or left_s <= 0:
                replies: list[FlushCacheReqOutput] = await self._ask(FlushCacheReqInput)
                refusals = [reply.message for reply in replies if not reply.success]
                if not refusals or left_s <= 0:
                    return not refusals, " ".join(refusals)
            await asyncio.sleep(min(_FLUSH_POLL_S, left_s))

    async def get_internal_states(
        self, timeout_s: float = CONTROL_TIMEOUT_S, brief: bool = False
    ) -> list[dict[str, Any]]:
        """Each scheduler's counters and pools, and its chosen kernels and fallbacks unless ``brief``, by DP rank."""
        asked = partial(GetInternalStateReq, brief=brief)
        return [reply.internal_state for reply in await self._ask(asked, timeout_s)]

    async def profile(self, message: Callable[..., ProfileReqInput]) -> list[str]:
        """Start or stop a profile of every scheduler; the files of first ranks. Raises RequestError."""
        replies: list[ProfileReqOutput] = await self._ask(message, PROFILE_TIMEOUT_S)
        if refusals := [reply.message for reply in replies if not reply.success]:
            raise RequestError(" ".join(dict.fromkeys(refusals)))
        return [reply.message for reply in replies]

    async def _ask(self, message_type: Any, timeout_s: float = CONTROL_TIMEOUT_S) -> list[Any]:
        """The answer of every scheduler."""
        if self.failure is not None:
            raise self.failure
        loop = asyncio.get_running_loop()
        asked: dict[int, asyncio.Future[Any]] = {next(self._counter): loop.create_future() for _ in self._senders}
        self._replies.update(asked)
        try:
            for seq, sender in zip(asked, self._senders, strict=True):
                sender.send(message_type(seq=seq))
            with anyio.fail_after(timeout_s):
                return await asyncio.gather(*asked.values())
        except TimeoutError:
            raise RequestError(
                f"The scheduler did not answer within {timeout_s:g} s.", 503, "ServiceUnavailableError"
            ) from None
        finally:
            for seq in asked:
                del self._replies[seq]

    async def _receive_loop(self) -> None:
        try:
            while True:
                self._handle(await self._receiver.recv())
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("The tokenizer manager can no longer read its inbox.")
            self.fail(RequestError(f"The server failed: {error}", 500, "InternalServerError"))

    def _handle(self, message: TokenizerMessage) -> None:
        if isinstance(message, BatchStrOutput):
            self.last_output_time = time.monotonic()
            for output in message.outputs:
                # A missing state means that the reader left; its abort has been sent.
                if (state := self._states.get(output.rid)) is None:
                    continue
                if output.finish_reason is not None:
                    self._forget(state)
                state.receive(output)
            return
        if isinstance(message, StartedReqs):
            fresh = [state for rid in message.rids if (state := self._states.get(rid)) and self._leave_queue(state)]
            for state in fresh:
                state.started(message.at)
            self.admission.started(len(fresh))
            return
        if (future := self._replies.get(message.seq)) is not None and not future.done():
            future.set_result(message)

    def _leave_queue(self, state: RequestState) -> bool:
        """False when it has left before."""
        if not state.waits:
            return False
        state.waits = False
        self.admission.remove(1, state.num_tokens)
        return True

    def _forget(self, state: RequestState) -> None:
        del self._states[state.wire_rid]
        self._balancer.release(state.dp_rank, state.num_tokens)

    def _release(self, group: RequestGroup) -> None:
        self._abandon(group)
        for state in group.states:
            self._log.finished(state)

    def _abandon(self, group: RequestGroup) -> None:
        """Forget a group's requests, and abort those that a scheduler may still be running."""
        for state in group.states:
            self._leave_queue(state)
            if state.wire_rid in self._states:
                self._forget(state)
                if self.failure is None:
                    self._abort(state)

    async def _prepare(
        self, obj: GenerateReqInput, group: RequestGroup, is_bounded: bool, place: Place | None
    ) -> tuple[list[TokenizedGenerateReqInput], bool]:
        """Reserve places in the queue, check and tokenize every prompt of ``obj``, and fill ``group``.

        Returns the messages, and whether the result is a list. On an error the places are free again.
        """
        singles, is_list = split_request(obj, self.max_requests_per_call)
        # Everything that needs no tokens is refused before any are made.
        all_params: list[SamplingParams] = []
        for i, single in enumerate(singles):
            check_logprobs(single, self.vocab_size)
            shared = i > 0 and single.sampling_params is singles[i - 1].sampling_params
            all_params.append(copy(all_params[-1]) if shared else self._sampling_params(single, group))
        places = sum(params.n for params in all_params)
        if place is not None:
            place.leave()
        if is_bounded:
            self.admission.check(places)
        self.admission.add(places, 0)
        try:
            tokenized = await self._tokenize(singles, all_params, obj, group)
            num_tokens = sum(state.num_tokens for state in group.states)
            if is_bounded:
                self.admission.check(0, num_tokens)
        except BaseException:
            self.admission.remove(places, 0)
            raise
        self.admission.add(0, num_tokens)
        return tokenized, is_list or places > len(singles)

    async def _tokenize(
        self, singles: list[SingleRequest], all_params: list[SamplingParams], obj: GenerateReqInput, group: RequestGroup
    ) -> list[TokenizedGenerateReqInput]:
        """The messages of all sequences, with a state in ``group`` for each."""
        tokenized: list[TokenizedGenerateReqInput] = []
        text_of = self._token_text if obj.return_text_in_logprobs and self.tokenizer is not None else lambda _: None
        num_asked = 0
        grammar_after = self._grammars.think_end_id() if obj.require_reasoning else None
        for single, params in zip(singles, all_params, strict=True):
            input_ids = self._fit_context(await self._encode(single), params, single.logprob_start_len < 0)
            num_asked += params.n * num_prompt_logprobs(single, len(input_ids))
            if num_asked > MAX_PROMPT_LOGPROBS_PER_CALL:
                raise too_many_logprobs("call", num_asked, MAX_PROMPT_LOGPROBS_PER_CALL)
            grammar = await self._grammars.grammar(params)
            for sample in range(params.n):
                rid = single.rid if params.n == 1 else f"{single.rid}_{sample}"
                # A client may reuse an id while the scheduler still ends its first use.
                wire_rid = f"{rid}#{next(self._counter)}" if single.rid_given else rid
                num_tokens = len(input_ids) + (params.max_new_tokens or 0)
                show_dp_rank = len(self._senders) > 1
                group.states.append(RequestState(single, rid, wire_rid, group, text_of, num_tokens, show_dp_rank))
                tokenized.append(
                    TokenizedGenerateReqInput(
                        rid=wire_rid,
                        input_ids=input_ids,
                        sampling_params=params.for_sample(sample),
                        stream=group.stream,
                        return_logprob=single.return_logprob,
                        logprob_start_len=single.logprob_start_len,
                        top_logprobs_num=single.top_logprobs_num,
                        token_ids_logprob=single.token_ids_logprob,
                        grammar=grammar,
                        grammar_after=grammar_after,
                    )
                )
        return tokenized

    def _token_text(self, token_id: int) -> str | None:
        if (text := self._token_texts.get(token_id)) is None:
            assert self.tokenizer is not None
            text = self._token_texts[token_id] = self.tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def _sampling_params(self, single: SingleRequest, group: RequestGroup) -> SamplingParams:
        """The checked parameters; unknown ones become warnings of ``group``."""
        raw = single.sampling_params
        if raw.keys() - _SAMPLING_FIELDS:
            fields = {name: value for name, value in raw.items() if name not in _SAMPLING_FIELDS}
            self.unknown_fields.judge(fields, _SAMPLING_FIELDS, "sampling_params.", group.warnings)
        return self.verified_params(raw)

    def verified_params(self, raw: dict[str, Any]) -> SamplingParams:
        """Sampling parameters of a request. Raises RequestError for unsupported ones."""
        try:
            params = SamplingParams.from_request(raw)
            params.verify(self.vocab_size)
        except SamplingParamsError as error:
            raise RequestError(str(error)) from None
        if self.tokenizer is None and params.stop:
            raise RequestError("stop strings need a tokenizer, and the server runs with --skip-tokenizer-init.")
        self._grammars.check_served(params)
        return params

    async def _encode(self, single: SingleRequest) -> list[int]:
        """Token ids of one prompt, each inside the vocabulary."""
        if single.input_ids is not None:
            ids = single.input_ids
            if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
                bad = next(i for i in ids if not 0 <= i < self.vocab_size)
                raise RequestError(f"input_ids holds {bad}, outside the vocabulary [0, {self.vocab_size}).")
        elif self.tokenizer is None:
            raise RequestError("The server runs with --skip-tokenizer-init: send input_ids, not text.")
        elif not single.text:
            raise RequestError("The prompt is empty: text has no characters.", param="input_ids")
        else:
            ids = await self.encode_text(single.text)
        if not ids:
            raise RequestError("The prompt is empty: it has no tokens.", param="input_ids")
        return ids

    async def encode_text(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; see ``PromptEncoder.encode``."""
        return await self._text().encode(text, add_special_tokens)

    async def decode_ids(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of ``ids``, which are inside the vocabulary."""
        return await self._text().decode(ids, skip_special_tokens)

    def _text(self) -> PromptEncoder:
        if self._encoder is None:
            raise RequestError("The server runs with --skip-tokenizer-init and has no tokenizer.")
        return self._encoder

    def _fit_context(self, input_ids: list[int], params: SamplingParams, may_cut: bool) -> list[int]:
        """The prompt, cut if allowed and if its reader ``may_cut`` it; clamps ``params`` to the room left after it."""
        if len(input_ids) >= self.context_len:
            if not (self.server_args.allow_auto_truncate and may_cut):
                raise longer_than_context(len(input_ids), self.context_len)
            logger.warning("Prompt cut from %d to %d tokens.", len(input_ids), self.context_len - 1)
            input_ids = input_ids[: self.context_len - 1]
        room = self.context_len - len(input_ids)
        params.max_new_tokens = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        params.min_new_tokens = min(params.min_new_tokens, params.max_new_tokens)
        params.top_k = min(params.top_k, self.vocab_size)
        return input_ids

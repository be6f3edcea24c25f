"""The offline engine: the same as the HTTP server, without HTTP."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Coroutine, Generator
from concurrent.futures import CancelledError
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec

from sglang.srt.arg_groups.plan import plan_launch
from sglang.srt.entrypoints import server_info
from sglang.srt.entrypoints.context import ServerContext, ServerStatus
from sglang.srt.entrypoints.launch import check_engine, start_engine
from sglang.srt.entrypoints.openai.protocol import ChatCompletionRequest
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.profile_api import ProfileBody, start_profile, stop_profile
from sglang.srt.managers.admission import Place
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.process_launch import EngineProcesses
from sglang.srt.managers.request_fields import REFUSED_FIELDS
from sglang.srt.managers.request_input import RequestError
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.distribution import refuse_upstream_distribution
from sglang.srt.utils.logging_config import configure_logging

T = TypeVar("T")
Text = str | list[str] | None
Params = dict[str, Any] | list[dict[str, Any]] | None
Ids = list[int] | list[list[int]] | None
_WATCH_INTERVAL_S = 0.5
_ENDED = "The engine has been shut down."


class Engine:
    """A model and its processes, used from Python.

    Takes the fields of ServerArgs as keywords. Results equal those of ``/generate``. Requests may come from any
    thread or asyncio loop; the engine runs them in its own loop. Wrong settings raise ServerArgsError, wrong requests
    ValueError, one that passes its ``request_timeout`` TimeoutError, and a failed engine RuntimeError.
    """

    def __init__(self, **kwargs: Any):
        refuse_upstream_distribution()
        plan = plan_launch(ServerArgs.from_kwargs(**{"log_level": "error", **kwargs}))
        configure_logging(plan.args.log_level, "engine")
        self.server_args = plan.args
        self._context, self._processes = start_engine(plan)
        self.tokenizer_manager = self._context.manager
        self._chat = OpenAIServingChat(self._context)
        self._loop = asyncio.new_event_loop()
        # Must not refer to this object: the finalizer ends the processes when it is collected, or when Python exits.
        running = _EngineLoop(self._context, self._processes, self._loop)
        self._thread = running.thread
        self._end = weakref.finalize(self, running.end)
        self._run(self.tokenizer_manager.start())
        self._context.status = ServerStatus.UP

    def generate(
        self, prompt: Text = None, sampling_params: Params = None, input_ids: Ids = None, *, stream: bool = False,
        **options: Any,
    ) -> Any:  # fmt: skip
        """A dictionary, a list of them for a batch or ``n`` > 1, or, with ``stream``, an iterator over dictionaries.

        ``options`` are the other fields of GenerateReqInput: return_logprob, logprob_start_len, top_logprobs_num,
        token_ids_logprob, return_text_in_logprobs, rid, request_timeout (seconds). Leaving the iterator
        ends its requests.
        """
        request = _request(prompt, sampling_params, input_ids, stream, options)
        if stream:
            return self._iterate(self.tokenizer_manager.generate_request(request))
        return self._run(self._whole(request))

    async def async_generate(
        self, prompt: Text = None, sampling_params: Params = None, input_ids: Ids = None, *, stream: bool = False,
        **options: Any,
    ) -> Any:  # fmt: skip
        """``generate`` for asyncio; with ``stream`` the result is an async iterator."""
        request = _request(prompt, sampling_params, input_ids, stream, options)
        if stream:
            return self._aiterate(self.tokenizer_manager.generate_request(request))
        return await self._arun(self._whole(request))

    def chat(self, messages: list[dict[str, Any]], *, stream: bool = False, **fields: Any) -> Any:
        """The reply of ``/v1/chat/completions`` to these fields; with ``stream``, an iterator over its chunks."""
        body = _chat_body(messages, stream, fields)
        return self._iterate(self._chat_chunks(body)) if stream else self._run(self._whole_chat(body))

    async def async_chat(self, messages: list[dict[str, Any]], *, stream: bool = False, **fields: Any) -> Any:
        """``chat`` for asyncio; with ``stream`` the result is an async iterator."""
        body = _chat_body(messages, stream, fields)
        return self._aiterate(self._chat_chunks(body)) if stream else await self._arun(self._whole_chat(body))

    def encode(self, *_: Any, **__: Any) -> Any:
        """Always raises NotImplementedError: generation models give no embeddings."""
        raise NotImplementedError("encode needs an embedding model, and this engine serves generation models only.")

    def get_server_info(self) -> dict[str, Any]:
        """What ``/server_info`` shows."""
        return self._run(server_info.server_info(self._context))

    def flush_cache(self) -> bool:
        """Drop the prefix cache; False while requests are in flight."""
        return self._run(self.tokenizer_manager.flush_cache())[0]

    def start_profile(self, **fields: Any) -> list[str]:
        """Trace the steps of the schedulers, to files in ``profile_dir``; ``fields``: those of ``/start_profile``."""
        return self._run(start_profile(self.tokenizer_manager, _converted(fields, ProfileBody)))

    def stop_profile(self) -> list[str]:
        """Write the traces; the files of the first ranks."""
        return self._run(stop_profile(self.tokenizer_manager))

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End every request whose id starts with ``rid``, or all of them."""

        async def abort() -> None:
            self.tokenizer_manager.abort_request(rid, abort_all)

        self._run(abort())

    def shutdown(self) -> None:
        """End requests in flight, then the processes. Safe to call twice."""
        self._end()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()

    async def _whole(self, request: GenerateReqInput, place: Place | None = None) -> Any:
        results = self.tokenizer_manager.generate_request(request, place=place)
        try:
            return await anext(results)
        finally:
            await results.aclose()

    async def _whole_chat(self, body: ChatCompletionRequest) -> dict[str, Any]:
        warnings: list[str] = []
        with Place(self.tokenizer_manager.admission) as place:
            native = await self._chat.native(body, warnings)
            result = await self._whole(native, place)
        whole: dict[str, Any] = msgspec.to_builtins(self._chat.whole(body, native, result, warnings))
        return whole

    async def _chat_chunks(self, body: ChatCompletionRequest) -> AsyncGenerator[dict[str, Any], None]:
        warnings: list[str] = []
        with Place(self.tokenizer_manager.admission) as place:
            native = await self._chat.native(body, warnings)
            results = self.tokenizer_manager.generate_request(native, incremental=True, place=place)
            async with aclosing(self._chat.chunks(body, native, results, warnings)) as chunks:
                async for chunk in chunks:
                    yield msgspec.to_builtins(chunk)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run ``work`` in the engine's loop and wait; an interrupt cancels it."""
        self._check_open(work)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except RequestError as error:
            raise _python_error(error) from None
        except CancelledError:
            raise RuntimeError(_ENDED) from None
        except BaseException:
            future.cancel()
            raise

    async def _arun(self, work: Coroutine[Any, Any, T]) -> T:
        self._check_open(work)
        try:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))
        except RequestError as error:
            raise _python_error(error) from None
        except asyncio.CancelledError:
            if self._end.alive:
                raise
            raise RuntimeError(_ENDED) from None

    def _check_open(self, work: Coroutine[Any, Any, Any]) -> None:
        if not self._end.alive:
            work.close()
            raise RuntimeError(_ENDED)

    def _iterate(self, results: AsyncGenerator[Any, None]) -> Generator[dict[str, Any], None, None]:
        try:
            while True:
                result = self._run(_next(results))
                if result is None:
                    return
                yield result
        finally:
            if self._end.alive and self._thread.is_alive():  # it is not in a fork
                closed = asyncio.run_coroutine_threadsafe(results.aclose(), self._loop)
                if threading.current_thread() is not self._thread:  # where it may be collected, and cannot wait
                    closed.result()

    async def _aiterate(self, results: AsyncGenerator[Any, None]) -> AsyncGenerator[dict[str, Any], None]:
        try:
            while True:
                result = await self._arun(_next(results))
                if result is None:
                    return
                yield result
        finally:
            if self._end.alive:
                await self._arun(results.aclose())


class _EngineLoop:
    """The engine's thread: runs the loop and watches the processes until ``end``."""

    def __init__(self, context: ServerContext, processes: EngineProcesses, loop: asyncio.AbstractEventLoop) -> None:
        self._context, self._processes, self._loop = context, processes, loop
        self._pid = os.getpid()
        self.thread = threading.Thread(target=self._serve, name="sglang-engine", daemon=True)
        self.thread.start()
        self._watcher = asyncio.run_coroutine_threadsafe(self._watch(), loop)

    def _serve(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(_cancel_all())

    async def _watch(self) -> None:
        while check_engine(self._context, self._processes) is None:
            await asyncio.sleep(_WATCH_INTERVAL_S)

    def end(self) -> None:
        """Fail requests in flight, end the thread, then the processes; does nothing in a fork of the caller's
        process."""
        if os.getpid() != self._pid:
            return
        if threading.current_thread() is self.thread:  # collected there: a thread cannot wait for itself
            threading.Thread(target=self.end).start()
            return
        self._watcher.cancel()
        asyncio.run_coroutine_threadsafe(self._context.manager.close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.thread.join()
        self._loop.close()
        self._processes.shutdown()


async def _cancel_all() -> None:
    """End the calls that are still prepared, of which the tokenizer manager does not know yet."""
    await asyncio.sleep(0)  # those of other threads begin
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _next(results: AsyncGenerator[Any, None]) -> Any:
    """The next result, None at the end: StopAsyncIteration cannot pass through a future."""
    return await anext(results, None)


def _request(
    prompt: Any, sampling_params: Any, input_ids: Any, stream: bool, options: dict[str, Any]
) -> GenerateReqInput:
    """The checked request. Raises ValueError, and TypeError for an option that does not exist."""
    given = {name: value for name, value in options.items() if value is not None}
    fields = {"text": prompt, "sampling_params": sampling_params, "input_ids": input_ids, "stream": stream, **given}
    for name in given:
        if name in REFUSED_FIELDS:
            raise ValueError(f"{name} is not supported: {REFUSED_FIELDS[name]}.")
        if name not in GenerateReqInput.__struct_fields__:
            raise TypeError(f"generate has no option {name!r}.")
    return _converted(fields, GenerateReqInput)


def _chat_body(messages: Any, stream: bool, fields: dict[str, Any]) -> ChatCompletionRequest:
    """The checked body. Raises ValueError, and TypeError for a field that does not exist."""
    for name in fields:
        if name not in ChatCompletionRequest.__struct_fields__:
            raise TypeError(f"chat has no option {name!r}.")
    return _converted({"messages": messages, "stream": stream, **fields}, ChatCompletionRequest)


def _converted(fields: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(fields, kind, strict=False)
    except msgspec.ValidationError as error:
        raise ValueError(f"The request is not valid: {error}") from None


def _python_error(error: RequestError) -> Exception:
    kinds: dict[int, type[Exception]] = {400: ValueError, 504: TimeoutError}
    return kinds.get(error.status_code, RuntimeError)(error.message)

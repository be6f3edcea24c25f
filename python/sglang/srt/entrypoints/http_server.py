"""The HTTP server over one engine: serve, watch its processes, and end in order."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Generator
from typing import Any

import uvicorn
from starlette.applications import Starlette

from sglang.srt.entrypoints.app import build_app
from sglang.srt.entrypoints.connections import Connection, fit_connections
from sglang.srt.entrypoints.context import ServerContext, ServerStatus
from sglang.srt.entrypoints.http_logs import bound_http_logs, on_loop_error
from sglang.srt.entrypoints.launch import check_engine
from sglang.srt.entrypoints.shutdown import EXIT_CUT, Drain, handle_stop_signals
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.process_launch import EngineProcesses
from sglang.srt.managers.request_input import RequestError
from sglang.srt.utils.audit import log_unpickle_count, reset_unpickle_count
from sglang.srt.utils.limits import DRAIN_WRITE_S, MAX_QUEUED_REQUESTS
from sglang.srt.utils.network import listen

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 65
_WATCH_INTERVAL_S = 0.5
# Connections that one turn of the event loop accepts: the first of many are answered before the last are accepted.
_ACCEPTS_PER_TURN = 32
# Of uvicorn's main loop.
_TICKS_PER_S = 10


class HttpServer(uvicorn.Server):
    """uvicorn over one engine: warms it up, watches its processes, and stops when one of them ends."""

    def __init__(self, context: ServerContext, processes: EngineProcesses):
        self.context = context
        self.exit_code = 0
        self._address = ""
        self.drain = Drain(context.manager, context.server_args.drain_timeout)
        self._processes = processes
        self._stalled_after_s = envs.SGLANG_HEALTH_CHECK_TIMEOUT.get()
        self._background: list[asyncio.Task[None]] = []
        args = context.server_args
        admission = context.manager.admission
        admission.max_requests = admission.max_requests or MAX_QUEUED_REQUESTS
        http_level = args.log_level_http or args.log_level
        connection: Any = functools.partial(Connection, max_connections=fit_connections(args.max_connections))
        config = uvicorn.Config(
            build_app(context, self._lifespan),
            http=connection,
            ws="none",
            log_config=None,
            log_level=http_level,
            access_log=http_level in ("debug", "info"),
            backlog=_ACCEPTS_PER_TURN,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=DRAIN_WRITE_S,
        )
        super().__init__(config)
        bound_http_logs(args.uvicorn_access_log_exclude_prefixes or ())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(on_loop_error)
        await super().startup(sockets)
        for listener in sockets or ():
            listen(listener)  # asyncio shortened the kernel's queue to what it accepts at once
            host, port = listener.getsockname()[:2]
            self._address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self._background = [asyncio.create_task(self._watch()), asyncio.create_task(self._warm_up())]

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Replaces uvicorn's handler: a signal starts the drain, while the listener still accepts connections."""
        if threading.current_thread() is threading.main_thread():
            handle_stop_signals(self.drain.ask)
        yield

    async def on_tick(self, counter: int) -> bool:
        if counter % _TICKS_PER_S == 0:
            connections: list[Any] = list(self.server_state.connections)
            for connection in connections:
                connection.check_time()
        if self.drain.is_asked and not self.should_exit:
            self.context.status = ServerStatus.STOPPING
            if not await self.drain.run(lambda: len(self.server_state.tasks)):
                self.exit_code = self.exit_code or EXIT_CUT
            self.should_exit = True
        return await super().on_tick(counter)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None, None]:
        await self.context.manager.start()
        try:
            yield
        finally:
            for task in self._background:
                task.cancel()
            await self.context.manager.close()

    async def _watch(self) -> None:
        """Stop with an error as soon as a child process has ended."""
        while True:
            await asyncio.sleep(_WATCH_INTERVAL_S)
            dead = check_engine(self.context, self._processes)
            if dead is not None:
                logger.error("%s: the server stops.", dead)
                self._stop_with_error()
                return
            stalled = self._processes.stalled(self._stalled_after_s)
            if stalled is not None and self.context.stalled is None:
                logger.warning("%s: /health and /ready answer 503 until it continues.", stalled)
            self.context.stalled = stalled
            if self._processes.is_asked_to_end() and not self.drain.is_asked:
                self.drain.ask(signal.SIGTERM)

    async def _warm_up(self) -> None:
        """One small request, so that the first client does not pay for first-use costs."""
        if not self.context.server_args.skip_server_warmup:
            params = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}
            probe = GenerateReqInput(input_ids=[0], sampling_params=params)
            try:
                async for _ in self.context.manager.generate_request(probe, is_bounded=False):
                    pass
            except RequestError as error:
                logger.error("The warm-up request failed: %s", error)
                self._stop_with_error()
                return
        if self.context.status is ServerStatus.STARTING:
            self.context.status = ServerStatus.UP
            reset_unpickle_count()
            logger.info("Listening on %s", self._address)
            logger.info("The server is fired up and ready to roll!")

    def _stop_with_error(self) -> None:
        self.exit_code = 1
        self.context.status = ServerStatus.STOPPING
        self.should_exit = True


def serve_engine(context: ServerContext, processes: EngineProcesses, listener: socket.socket) -> int:
    """Serve until a signal or the end of the engine; returns the exit status. Raises PortError."""
    listen(listener)
    server = HttpServer(context, processes)
    server.run(sockets=[listener])
    log_unpickle_count(logger)
    return server.exit_code

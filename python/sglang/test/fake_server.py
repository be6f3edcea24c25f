"""The real HTTP server over a fake engine, in threads of the test's process."""

from __future__ import annotations

import tempfile
import threading
import time
import types
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import httpx
from tokenizers import AddedToken

from sglang.srt.entrypoints.context import ServerContext, ServerStatus
from sglang.srt.entrypoints.http_server import HttpServer
from sglang.srt.managers.io_struct import FinishReason
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.server_args import ServerArgs
from sglang.srt.utils.hf_tokenizer import Tokenizer
from sglang.srt.utils.network import bind, listen
from sglang.test.fake_scheduler import FakeEngine
from sglang.test.test_utils import CustomTestCase
from sglang.test.tiny_tokenizers import byte_level_tokenizer, write_tokenizer

CONTEXT_LEN = 128


class FakeServer:
    """Serves until ``stop``; ``scheduler`` is the fake one, ``error`` the one that ends requests.

    ``added_tokens`` are further tokens of the vocabulary, ``tokenizer_config`` keys of tokenizer_config.json.
    ``settings`` are fields of ServerArgs. The listener is always on loopback, whatever ``host`` they name.
    """

    def __init__(
        self,
        generation_defaults: dict[str, Any] | None = None,
        error: FinishReason | None = None,
        added_tokens: Sequence[str] = (),
        tokenizer_config: dict[str, Any] | None = None,
        context_len: int = CONTEXT_LEN,
        **settings: Any,
    ):
        self._folder = tempfile.TemporaryDirectory()
        backend = byte_level_tokenizer()
        backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in added_tokens])
        folder = write_tokenizer(self._folder.name, backend, **(tokenizer_config or {}))
        args = replace(ServerArgs(), model_path=folder, tokenizer_path=folder, log_level="error", **settings)
        self.tokenizer = None if args.skip_tokenizer_init else Tokenizer.from_path(folder)
        self.engine = FakeEngine(args, self.tokenizer)
        self.scheduler = self.engine.scheduler
        self.scheduler.error = error
        model: Any = types.SimpleNamespace(
            architecture="FakeForCausalLM",
            context_len=context_len,
            vocab_size=Tokenizer.from_path(folder).vocab_size,
            hf_config={"model_type": "fake"},
            generation_defaults=generation_defaults or {},
        )
        manager = TokenizerManager(args, model, self.tokenizer, self.engine.ipc)
        self.context = ServerContext(manager, args, model, self.engine.scheduler_info)
        self._listener = bind("127.0.0.1", 0)
        listen(self._listener)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        processes: Any = self.engine
        self.server = HttpServer(self.context, processes)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()

    def wait_ready(self) -> FakeServer:
        """Wait for the warm-up request; then forget it."""
        self.until(lambda: self.context.status is ServerStatus.UP)
        self.scheduler.received.clear()
        return self

    def until(self, condition: Any, timeout_s: float = 60.0) -> None:
        """Wait until ``condition()`` holds; AssertionError after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition did not come true in time"
            time.sleep(0.01)

    def join(self, timeout_s: float = 60.0) -> int:
        """Wait for the end of the server; returns its exit status."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the server did not stop"
        return self.server.exit_code

    def stop(self) -> None:
        self.server.should_exit = True
        with closing(self._listener):
            self.join()
        self.engine.shutdown()
        self._folder.cleanup()


class FakeServerTestCase(CustomTestCase):
    """One fake server per class, ``settings`` its fields of ServerArgs; each test starts with a healthy engine."""

    settings: dict[str, Any] = {}
    fake: FakeServer
    client: httpx.Client

    @classmethod
    def setUpClass(cls) -> None:
        cls.fake = FakeServer(**cls.settings).wait_ready()
        cls.client = httpx.Client(base_url=cls.fake.url, timeout=60)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.client.close()
        cls.fake.stop()

    def setUp(self) -> None:
        scheduler = self.fake.scheduler
        scheduler.delay_s, scheduler.frozen, scheduler.error = 0.0, False, None
        scheduler.received.clear()

    def generate(self, **body: Any) -> httpx.Response:
        return self.client.post("/generate", json=body)

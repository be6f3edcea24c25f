"""The HTTP side of a serving benchmark: one timed request per backend, and the calls around a run."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from sglang.bench_utils.datasets import DatasetRow
from sglang.bench_utils.metrics import RequestOutput

BACKENDS = ("sglang", "sglang-oai", "sglang-oai-chat")
# Known from upstream: other servers, or other inputs.
UPSTREAM_ONLY_BACKENDS = (
    "sglang-native", "sglang-embedding", "vllm", "vllm-chat", "lmdeploy", "lmdeploy-chat", "trt", "gserver", "truss",
)  # fmt: skip
REQUEST_TIMEOUT_S = 6 * 3600.0
ERROR_CHARS = 500


class BenchmarkError(RuntimeError):
    """The server cannot be measured; the message states the request and the reply."""


@dataclass(frozen=True)
class Target:
    """Where and how requests are sent. ``incremental``: streamed chunks of /generate hold only what is new."""

    backend: str
    base_url: str
    model: str
    stream: bool = True
    ignore_eos: bool = True
    extra_body: dict[str, Any] = field(default_factory=dict)
    incremental: bool = False

    @property
    def path(self) -> str:
        paths = {"sglang": "/generate", "sglang-oai": "/v1/completions", "sglang-oai-chat": "/v1/chat/completions"}
        return paths[self.backend]

    def body(self, row: DatasetRow) -> dict[str, Any]:
        """The request's JSON: greedy, exactly ``row.output_len`` tokens unless the end token may end it."""
        if self.backend == "sglang":
            prompt_key = "text" if isinstance(row.prompt, str) else "input_ids"
            sampling = {"temperature": 0.0, "max_new_tokens": row.output_len, "ignore_eos": self.ignore_eos}
            return {prompt_key: row.prompt, "sampling_params": sampling, "stream": self.stream, **self.extra_body}
        body: dict[str, Any] = {"model": self.model, "temperature": 0.0, "stream": self.stream}
        if self.backend == "sglang-oai":
            body.update(prompt=row.prompt, max_tokens=row.output_len)
        else:
            messages = [{"role": "user", "content": row.prompt}]
            body.update(messages=messages, max_completion_tokens=row.output_len)
        body["ignore_eos"] = self.ignore_eos
        if self.stream:
            body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        return {**body, **self.extra_body}


@dataclass(frozen=True)
class Chunk:
    """Content of one message of a reply: text (all so far, or the new part), and tokens so far, if given."""

    text: str
    is_delta: bool
    num_tokens: int | None


def read_chunk(target: Target, message: dict[str, Any]) -> Chunk:
    """Read one reply or streamed message; raises BenchmarkError if it contains an error."""
    if "error" in message or message.get("object") == "error":
        raise BenchmarkError(str(message.get("error", message.get("message")))[:ERROR_CHARS])
    if target.backend == "sglang":
        meta = message["meta_info"]
        reason = meta.get("finish_reason")
        if isinstance(reason, dict) and reason.get("type") == "abort":
            raise BenchmarkError(f"aborted: {reason.get('message')}"[:ERROR_CHARS])
        return Chunk(message.get("text") or "", target.stream and target.incremental, meta["completion_tokens"])
    usage = message.get("usage") or {}
    text = ""
    for choice in message.get("choices") or []:
        if choice.get("finish_reason") == "abort":
            raise BenchmarkError("aborted by the server")
        part = choice.get("delta") or choice.get("message") or {}
        text += choice.get("text") or part.get("reasoning_content") or ""
        text += part.get("content") or ""
    return Chunk(text, True, usage.get("completion_tokens"))


class Timeline:
    """Turns the chunks of one reply, with their times of arrival, into a RequestOutput."""

    def __init__(self, output: RequestOutput) -> None:
        self._output = output
        self._parts: list[str] = []
        self._previous: float | None = None

    def add(self, chunk: Chunk, now: float) -> None:
        """Record the time of a message with tokens; one without (role, usage) has no time."""
        out = self._output
        if chunk.text:
            self._parts = [*self._parts, chunk.text] if chunk.is_delta else [chunk.text]
        if chunk.num_tokens is None:
            new = 1 if chunk.text else 0
        else:
            new = chunk.num_tokens - out.output_len
        if new <= 0:
            return
        out.output_len += new
        if self._previous is None:
            out.ttft = now - out.start
        else:
            out.itl += [(now - self._previous) / new] * new
        self._previous = now
        out.latency = now - out.start

    def finish(self) -> None:
        self._output.text = "".join(self._parts)
        if self._previous is None:
            self._output.error = "the reply contains no token"


async def send_request(client: httpx.AsyncClient, target: Target, row: DatasetRow) -> RequestOutput:
    """Send one request and time its reply; failures are stored in ``error``, never raised."""
    output = RequestOutput(prompt_len=row.prompt_len, start=time.perf_counter())
    timeline = Timeline(output)
    try:
        async for message in _messages(client, target, row):
            timeline.add(read_chunk(target, message), time.perf_counter())
        timeline.finish()
    except (httpx.HTTPError, BenchmarkError, ValueError, KeyError) as error:
        output.error = str(error) if isinstance(error, BenchmarkError) else f"{type(error).__name__}: {error}"
    return output


async def _messages(client: httpx.AsyncClient, target: Target, row: DatasetRow) -> AsyncIterator[dict[str, Any]]:
    url = target.base_url + target.path
    async with client.stream("POST", url, json=target.body(row)) as response:
        if response.status_code != 200:
            text = (await response.aread()).decode("utf-8", "replace")
            raise BenchmarkError(f"HTTP {response.status_code}: {text[:ERROR_CHARS]}")
        if not target.stream:
            yield json.loads(await response.aread())
            return
        async for line in response.aiter_lines():
            data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
            if data == "[DONE]":
                return
            if data:
                yield json.loads(data)
        raise BenchmarkError("the stream ended before [DONE]")


def make_client(headers: dict[str, str], max_connections: int | None = None) -> httpx.AsyncClient:
    """A client that waits as long as a request takes; proxies of the environment are not used."""
    limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
    return httpx.AsyncClient(timeout=httpx.Timeout(REQUEST_TIMEOUT_S), limits=limits, headers=headers, trust_env=False)


class ServerControl:
    """The calls around a run: readiness, model names, cache, server information."""

    def __init__(self, client: httpx.AsyncClient, base_url: str) -> None:
        self._client = client
        self._base_url = base_url

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Return once ``/health`` answers 200; raises BenchmarkError after ``timeout_s`` seconds."""
        deadline = time.monotonic() + timeout_s
        said = "no answer"
        while True:
            try:
                response = await self._client.get(self._base_url + "/health", timeout=10.0)
                if response.status_code == 200:
                    return
                said = f"HTTP {response.status_code}"
            except httpx.HTTPError as error:
                said = f"{type(error).__name__}: {error}"
            if time.monotonic() >= deadline:
                raise BenchmarkError(
                    f"no server is ready at {self._base_url} after {timeout_s:.0f} s ({said}): start one with "
                    "`python -m sglang.launch_server`, or name it with --base-url or --host and --port"
                )
            await asyncio.sleep(0.5)

    async def get(self, path: str) -> dict[str, Any]:
        """The JSON object at ``path``; raises BenchmarkError when there is none."""
        try:
            response = await self._client.get(self._base_url + path, timeout=60.0)
            value = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise BenchmarkError(f"GET {path} failed: {error}") from error
        if response.status_code != 200 or not isinstance(value, dict):
            raise BenchmarkError(f"GET {path} gave HTTP {response.status_code}: {response.text[:ERROR_CHARS]}")
        return value

    async def try_get(self, path: str) -> dict[str, Any]:
        """As ``get``, but an empty object if the server does not serve this path (a router, or a closed endpoint)."""
        try:
            return await self.get(path)
        except BenchmarkError:
            return {}

    async def post(self, path: str, body: dict[str, Any] | None = None) -> str:
        """The reply text of an administrative endpoint; raises BenchmarkError if it refuses."""
        response = await self._client.post(self._base_url + path, json=body, timeout=600.0)
        if response.status_code != 200:
            raise BenchmarkError(f"POST {path} gave HTTP {response.status_code}: {response.text[:ERROR_CHARS]}")
        return response.text.strip()

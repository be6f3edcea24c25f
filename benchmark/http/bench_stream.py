"""CPU time of the HTTP and tokenizer process per streamed token, without a model.

    python benchmark/http/bench_stream.py

The real server, on a thread of its own whose CPU time is read, streams to --clients connections of another process;
tokens come from a script, which adds one to every request each --step-ms. Each round streams --output-len tokens per
request and a quarter of that. It prints min / median / max over the rounds of the CPU time per token, with the start
and end of requests included, then the time of one more token, and the share of a core that each is at --tokens-per-s,
the rate of a model.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx

from sglang.test.device_time import describe_machine
from sglang.test.fake_server import FakeServer


async def _read_all(url: str, path: str, body: dict[str, Any], clients: int) -> None:
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, trust_env=False, limits=limits) as client:

        async def read() -> None:
            async with client.stream("POST", path, json=body) as reply:
                reply.raise_for_status()
                async for _ in reply.aiter_raw():
                    pass

        await asyncio.gather(*(read() for _ in range(clients)))


def load(url: str, path: str, body: dict[str, Any], clients: int) -> None:
    asyncio.run(_read_all(url, path, body, clients))


def cpu_seconds(server: FakeServer) -> float:
    """CPU time of the server's thread so far."""
    assert server._thread.ident is not None
    return time.clock_gettime(time.pthread_getcpuclockid(server._thread.ident))


def stream(server: FakeServer, path: str, body: dict[str, Any], clients: int) -> float:
    """CPU seconds that the server takes to stream ``body`` to ``clients``."""
    client = multiprocessing.get_context("spawn").Process(target=load, args=(server.url, path, body, clients))
    began = cpu_seconds(server)
    client.start()
    client.join()
    if client.exitcode:
        raise RuntimeError(f"the clients ended with status {client.exitcode}")
    return cpu_seconds(server) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--step-ms", type=float, default=27.0)
    parser.add_argument("--tokens-per-s", type=float, default=2376.0, help="Default: the decode bench at batch 64.")
    args = parser.parse_args()
    print(describe_machine())
    server = FakeServer(max_running_requests=args.clients).wait_ready()
    server.scheduler.delay_s = args.step_ms / 1000
    assert server.tokenizer is not None
    ids = server.tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 20)[: args.output_len]
    server.scheduler.script = lambda _: ids
    sampling = {"ignore_eos": True, "temperature": 0}
    chat = {"model": "default", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True, "stream": True}
    bodies: dict[str, Callable[[int], dict[str, Any]]] = {
        "/generate": lambda n: {"text": "hi", "sampling_params": {**sampling, "max_new_tokens": n}, "stream": True},
        "/v1/chat/completions": lambda n: {**chat, "max_tokens": n},
    }
    try:
        for path, body in bodies.items():
            whole: list[float] = []
            further: list[float] = []
            for number in range(args.rounds + 1):
                few = args.output_len // 4
                short, long = (stream(server, path, body(length), args.clients) for length in (few, args.output_len))
                if number:
                    whole.append(long / (args.clients * args.output_len))
                    further.append((long - short) / (args.clients * (args.output_len - few)))
            for name, figures in (("in all", whole), ("a further one", further)):
                low, middle, high = (value * 1e6 for value in (min(figures), statistics.median(figures), max(figures)))
                share = middle * args.tokens_per_s / 1e4
                print(
                    f"{path:20s} {name:13s} {low:6.1f} / {middle:6.1f} / {high:6.1f} us per token, "
                    f"{share:.1f} % of a core at {args.tokens_per_s:g} tokens/s",
                    flush=True,
                )
    finally:
        server.stop()


if __name__ == "__main__":
    main()

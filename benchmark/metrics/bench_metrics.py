"""What /metrics costs: one server with them, read once per second, and one without, given the same load alternately.

    python benchmark/metrics/bench_metrics.py [--starts 4] [--seconds 100]

Every turn streams --batch-size requests of --output-len tokens. Printed are the seconds of a turn (min / median / max),
by the clock and of the CPU of all processes of the server, and the ratio in the pairs of turns: geometric mean and
95 % interval, and the mean of each start. The placement of memory differs from start to start, and with it the speed by
some percent: both servers are started --starts times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import psutil

from sglang.bench_utils.clients import Target, make_client, send_request
from sglang.bench_utils.datasets import DatasetRow
from sglang.test.bench_checkpoint import CONFIG, make_checkpoint
from sglang.test.device_time import describe_machine
from sglang.test.paired import paired_ratio, rounds_within
from sglang.test.process_tree import kill_process_tree
from sglang.test.test_utils import free_url, popen_launch_server


class Server:
    """One server, with or without metrics."""

    def __init__(self, folder: Path, with_metrics: bool, args: argparse.Namespace) -> None:
        self.url, self.with_metrics = free_url(), with_metrics
        flags = ["--max-running-requests", str(args.batch_size), "--log-level", "error"]
        self.process = popen_launch_server(
            str(folder), self.url, other_args=[*flags, *["--enable-metrics"] * with_metrics]
        )
        main = psutil.Process(self.process.pid)
        self._processes = [main, *main.children(recursive=True)]

    def cpu(self) -> float:
        """Seconds so far."""
        return sum(sum(process.cpu_times()[:2]) for process in self._processes)

    def turn(self, seed: int, args: argparse.Namespace) -> tuple[float, float]:
        """Seconds by the clock and of the CPU."""
        began = self.cpu()
        seconds = asyncio.run(self._load(seed, args))
        return seconds, self.cpu() - began

    async def _load(self, seed: int, args: argparse.Namespace) -> float:
        prompts = np.random.default_rng(seed).integers(2, CONFIG["vocab_size"], (args.batch_size, args.input_len))
        rows = [DatasetRow(prompt, args.input_len, args.output_len) for prompt in prompts.tolist()]
        target = Target("sglang", self.url, "", True)
        async with make_client({}) as client, self._reader(client):
            began = time.perf_counter()
            outputs = await asyncio.gather(*(send_request(client, target, row) for row in rows))
            seconds = time.perf_counter() - began
        assert all(output.success for output in outputs), [output.error for output in outputs]
        return seconds

    @contextlib.asynccontextmanager
    async def _reader(self, client) -> AsyncIterator[None]:  # type: ignore[no-untyped-def]
        """Reads the page as Prometheus does, while the load runs."""

        async def read() -> None:
            while self.with_metrics:
                (await client.get(f"{self.url}/metrics")).raise_for_status()
                await asyncio.sleep(1)

        task = asyncio.create_task(read())
        try:
            yield
        finally:
            task.cancel()


# Seconds by the clock and of the CPU of each turn, without metrics and with them.
Turns = dict[bool, list[tuple[float, float]]]


def one_start(folder: Path, order: tuple[bool, ...], args: argparse.Namespace) -> Turns:
    """The turns of two servers, started in ``order``; the first of each warms up."""
    servers: list[Server] = []
    turns: Turns = {False: [], True: []}
    try:
        for with_metrics in order:
            servers.append(Server(folder, with_metrics, args))
        for number in rounds_within(args.rounds, args.seconds / args.starts):
            for server in servers[:: 1 if number % 2 else -1]:
                seconds = server.turn(number, args)
                if number:
                    turns[server.with_metrics].append(seconds)
    finally:
        for server in servers:
            kill_process_tree(server.process.pid)
    return turns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=100, help="Of each start.")
    parser.add_argument("--starts", type=int, default=4, help="An even number: each server is the first equally often.")
    parser.add_argument(
        "--seconds", type=float, default=600.0, help="Of all turns: fewer rounds where they take longer."
    )
    args = parser.parse_args()
    print(describe_machine())
    starts: list[Turns] = []
    folder = make_checkpoint()
    for number in range(args.starts):
        starts.append(one_start(folder, (False, True)[:: 1 if number % 2 else -1], args))
    turns = {key: [turn for start in starts for turn in start[key]] for key in (False, True)}
    for index, clock in enumerate(("clock", "CPU")):
        off, on = ([turn[index] for turn in turns[key]] for key in (False, True))
        for name, values in (("without", off), ("with", on)):
            print(f"{clock:5s} {name:7s} {min(values):.3f} / {statistics.median(values):.3f} / {max(values):.3f} s")
        means = [
            math.exp(statistics.fmean(math.log(b[index] / a[index]) for a, b in zip(start[False], start[True])))
            for start in starts
        ]
        print(
            f"{clock:5s} with over without: {paired_ratio(off, on)} of {len(on)} pairs, by start "
            + ", ".join(f"{mean:.4f}" for mean in means)
        )


if __name__ == "__main__":
    main()

"""What serving costs next to the model: scheduler time outside forward and sampling, and CPU time of the front.

    python benchmark/scheduler_overhead/bench_scheduler.py

Starts a server, keeps --batch-size requests in flight over HTTP, and reports as shares of the run's wall time

    scheduling   seconds of scheduler steps outside forward and sampling (/server_info, schedule_seconds)
    front        CPU seconds of the HTTP and tokenizer process, and of the detokenizer (psutil)

whole replies and streamed ones separately, min / median / max over the rounds. The client is this process and is
not counted. No prompt is sent twice.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil

from sglang.bench_utils.clients import Target, make_client, send_request
from sglang.bench_utils.datasets import DatasetRow
from sglang.test.bench_checkpoint import CONFIG, make_checkpoint
from sglang.test.device_time import describe_machine
from sglang.test.process_tree import kill_process_tree
from sglang.test.test_utils import free_url, popen_launch_server


@dataclass(frozen=True)
class Snapshot:
    """Clocks of the server at one moment, in seconds."""

    schedule: float
    forward: float
    main_cpu: float
    detokenizer_cpu: float


class Server:
    """One server process with its children."""

    def __init__(self, folder: Path, max_running: int) -> None:
        self.url = free_url()
        flags = ["--max-running-requests", str(max_running), "--log-level", "error"]
        self.process = popen_launch_server(str(folder), self.url, other_args=flags)
        self.main = psutil.Process(self.process.pid)
        children = {" ".join(child.cmdline()): child for child in self.main.children(recursive=True)}
        self.detokenizer = next(child for line, child in children.items() if "detokenizer_process" in line)

    def snapshot(self) -> Snapshot:
        state = httpx.get(self.url + "/server_info", timeout=30.0, trust_env=False).json()["internal_states"][0]
        cpu = [sum(process.cpu_times()[:2]) for process in (self.main, self.detokenizer)]
        return Snapshot(state["schedule_seconds"], state["forward_seconds"], *cpu)

    def close(self) -> None:
        kill_process_tree(self.process.pid)


async def _send_all(target: Target, rows: list[DatasetRow]) -> float:
    async with make_client({}) as client:
        started = time.perf_counter()
        outputs = await asyncio.gather(*(send_request(client, target, row) for row in rows))
        seconds = time.perf_counter() - started
    failed = [output.error for output in outputs if output.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
    return seconds


def load_round(url: str, stream: bool, seed: int, args: argparse.Namespace) -> float:
    """Send one batch and wait for it; returns seconds."""
    rng = np.random.default_rng(seed)
    size = (args.batch_size, args.input_len)
    prompts = rng.integers(2, CONFIG["vocab_size"], size=size).tolist()
    rows = [DatasetRow(prompt, args.input_len, args.output_len) for prompt in prompts]
    return asyncio.run(_send_all(Target("sglang", url, "", stream), rows))


def measure(server: Server, stream: bool, args: argparse.Namespace) -> list[dict[str, float]]:
    """Shares of each round, the warm-up round left out."""
    rounds = []
    for number in range(args.rounds + 1):
        before = server.snapshot()
        seconds = load_round(server.url, stream, 2 * number + stream, args)
        after = server.snapshot()
        scheduling = after.schedule - before.schedule
        main, detokenizer = after.main_cpu - before.main_cpu, after.detokenizer_cpu - before.detokenizer_cpu
        rounds.append(
            {
                "tokens/s": args.batch_size * args.output_len / seconds,
                "forward and sampling %": 100 * (after.forward - before.forward) / seconds,
                "scheduling %": 100 * scheduling / seconds,
                "main process %": 100 * main / seconds,
                "detokenizer %": 100 * detokenizer / seconds,
                "scheduling + front %": 100 * (scheduling + main + detokenizer) / seconds,
            }
        )
    return rounds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model-path", type=Path, help="Default: the checkpoint of the decode bench.")
    args = parser.parse_args()
    folder = args.model_path or make_checkpoint()
    print(describe_machine())
    print(f"batch {args.batch_size}, {args.input_len} tokens in, {args.output_len} out; min / median / max")
    server = Server(folder, args.batch_size)
    try:
        for stream in (False, True):
            rounds = measure(server, stream, args)
            print("streamed replies" if stream else "whole replies")
            for name in rounds[0]:
                values = [entry[name] for entry in rounds]
                print(f"  {name:24s} {min(values):9.2f} / {statistics.median(values):9.2f} / {max(values):9.2f}")
    finally:
        server.close()


if __name__ == "__main__":
    main()

"""Seconds from the start of the process until the server is ready, with the embedded model.

    python benchmark/startup/bench_startup.py --runs 5

Ready means that /health_generate answers 200; what follows is ended before the next run. The first run warms the disk
cache and is not counted. Flags that this script does not know go to launch_server.
"""

from __future__ import annotations

import argparse
import statistics
import time

from sglang.test.device_time import describe_machine
from sglang.test.process_tree import kill_process_tree
from sglang.test.test_utils import free_url, popen_launch_server


def seconds_to_ready(server_flags: list[str]) -> float:
    """Start a server, wait until it is ready, end it; raises RuntimeError with its output when it is not."""
    started = time.perf_counter()
    process = popen_launch_server(None, free_url(), other_args=server_flags)
    seconds = time.perf_counter() - started
    kill_process_tree(process.pid)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    args, server_flags = parser.parse_known_args()
    print(describe_machine())
    seconds_to_ready(server_flags)
    times = [seconds_to_ready(server_flags) for _ in range(args.runs)]
    print(
        f"process start to ready, {args.runs} runs: min {min(times):.2f} s, median {statistics.median(times):.2f} s, "
        f"max {max(times):.2f} s"
    )


if __name__ == "__main__":
    main()

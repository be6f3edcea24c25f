"""Seconds from the start of the process until the server is ready, with the embedded model.

    python benchmark/startup/bench_startup.py --runs 5

Ready means that /health answers 200; what follows is ended before the next run. The first run warms the disk cache and
is not counted. Flags that this script does not know go to launch_server.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import torch

import sglang
from sglang.srt.utils.common import get_free_port, kill_process_tree

TIMEOUT_S = 120.0
POLL_S = 0.02


def is_healthy(opener: urllib.request.OpenerDirector, url: str) -> bool:
    try:
        with opener.open(url, timeout=5.0) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def seconds_to_ready(server_flags: list[str]) -> float:
    """Start a server, wait until it is healthy, end it; raises RuntimeError with its output when it is not."""
    port = get_free_port()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    command = [sys.executable, "-m", "sglang.launch_server", "--port", str(port), *server_flags]
    with tempfile.TemporaryFile(mode="w+") as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not is_healthy(opener, f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.perf_counter() - started > TIMEOUT_S:
                    log.seek(0)
                    raise RuntimeError(f"the server did not get ready: {command}\n{log.read()[-4000:]}")
                time.sleep(POLL_S)
            return time.perf_counter() - started
        finally:
            kill_process_tree(process.pid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    args, server_flags = parser.parse_known_args()
    print(
        f"device: cpu, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; python {sys.version.split()[0]}, "
        f"torch {torch.__version__}, sglang-amd {sglang.__version__}"
    )
    seconds_to_ready(server_flags)
    times = [seconds_to_ready(server_flags) for _ in range(args.runs)]
    print(
        f"process start to ready, {args.runs} runs: min {min(times):.2f} s, median {statistics.median(times):.2f} s, "
        f"max {max(times):.2f} s"
    )


if __name__ == "__main__":
    main()

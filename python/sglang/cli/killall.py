"""The console script ``killall_sglang``: end every server of this user, with its processes."""

from __future__ import annotations

import os
import sys

import psutil

MODULES = ("sglang.launch_server", "sglang.srt.managers.")


def is_server(command: list[str]) -> bool:
    """Whether a command line is that of a server or of one of its processes."""
    if "-m" in command[:-1]:
        module = command[command.index("-m") + 1]
        return module.startswith(MODULES)
    return any(os.path.basename(a) == "sglang" and b == "serve" for a, b in zip(command, command[1:]))


def main() -> int:
    """Terminate, then kill after 5 s; prints what was ended. Returns 0, also when there was nothing to end."""
    victims = []
    for process in psutil.process_iter():
        try:
            mine = process.uids().real == os.getuid() and process.pid != os.getpid()
            if mine and is_server(process.cmdline()):
                victims.append(process)
                process.terminate()
        except psutil.Error:
            continue
    _, alive = psutil.wait_procs(victims, timeout=5)
    for process in alive:
        process.kill()
    print(f"ended {len(victims)} processes: {[process.pid for process in victims]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

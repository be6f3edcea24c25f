"""Ends a process with all that it started, also when it ignores signals."""

from __future__ import annotations

import os
import time

import psutil

KILL_WAIT_S = 5.0


def _runs(process: psutil.Process) -> bool:
    """False for a zombie too: in a container whose first process reaps nothing, orphans stay zombies for ever."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def kill_process_tree(parent_pid: int, include_parent: bool = True) -> None:
    """Kill all descendants of a process, then the process, and wait up to KILL_WAIT_S until they are gone.

    A pid that no longer exists is no error. With the own pid the call returns only if `include_parent` is False.
    """
    try:
        parent = psutil.Process(parent_pid)
        victims = parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return
    if include_parent and parent_pid != os.getpid():
        victims.append(parent)
    for process in victims:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass
    deadline = time.monotonic() + KILL_WAIT_S
    while any(map(_runs, victims)) and time.monotonic() < deadline:
        time.sleep(0.01)
    if include_parent and parent_pid == os.getpid():
        parent.kill()

"""A count of loop turns in memory that a child shares with its parent, which shows whether the process hangs or is
stopped."""

from __future__ import annotations

import mmap
import os
import struct
import time

_COUNT = struct.Struct("=Q")
# If the parent itself was stopped and did not look for longer, that time does not count against a child.
MAX_GAP_S = 2.0


class Pulse:
    """The child's side: ``beat`` once per turn of the loop, idle turns included."""

    def __init__(self, descriptor: int) -> None:
        self._memory = mmap.mmap(descriptor, _COUNT.size)
        self._count = 0

    def beat(self) -> None:
        self._count += 1
        _COUNT.pack_into(self._memory, 0, self._count)


class PulseReader:
    """The parent's side. The child gets ``descriptor``; the memory has no name and goes with the two processes."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("sglang-pulse")
        os.ftruncate(self.descriptor, _COUNT.size)
        self._memory = mmap.mmap(self.descriptor, _COUNT.size, prot=mmap.PROT_READ)
        self._count = 0
        self.last_silent_s = 0.0  # the last result of ``silent_s``
        self._looked = time.monotonic()

    def silent_s(self) -> float:
        """Seconds, counted from look to look, for which the child has made no turn; 0 before its first one."""
        now = time.monotonic()
        count = _COUNT.unpack_from(self._memory)[0]
        if count != self._count or count == 0:
            self.last_silent_s = 0.0
        else:
            self.last_silent_s += min(now - self._looked, MAX_GAP_S)
        self._count, self._looked = count, now
        return self.last_silent_s

    def close(self) -> None:
        """Safe to call twice."""
        if self.descriptor >= 0:
            self._memory.close()
            os.close(self.descriptor)
            self.descriptor = -1


def is_stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP, SIGTSTP) or a debugger holds the process; False where /proc does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name before the state may contain any characters, including parentheses.
            return file.read().rpartition(b")")[2].split()[0] in (b"T", b"t")
    except (OSError, IndexError):
        return False

"""A child process in which one line of the product is changed: a test that still passes tests nothing."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import NamedTuple


class Mutation(NamedTuple):
    """``old`` occurs once in the source of ``module``; ``new`` replaces it."""

    name: str
    module: ModuleType
    old: str
    new: str


Case = tuple["Mutation | None", Callable[[], object]]


def apply(mutation: Mutation) -> None:
    """Replace the module's contents by those of its changed source, also where they were imported by name."""
    source = inspect.getsource(mutation.module)
    if source.count(mutation.old) != 1:
        raise LookupError(f"{mutation.name}: {mutation.old!r} stands {source.count(mutation.old)} times")
    before = dict(vars(mutation.module))
    code = compile(source.replace(mutation.old, mutation.new), mutation.module.__file__ or "", "exec")
    exec(code, vars(mutation.module))
    changed = {id(before[n]): v for n, v in vars(mutation.module).items() if n in before and before[n] is not v}
    for module in [m for name, m in sys.modules.items() if name.startswith(("sglang.", "__main__"))]:
        for name, value in list(vars(module).items()):
            if id(value) in changed and getattr(value, "__module__", None) == mutation.module.__name__:
                setattr(module, name, changed[id(value)])


OUT_OF_DATE = 3


def is_noticed(mutation: Mutation | None, check: Callable[[], object], timeout_s: int = 90) -> bool:
    """Whether ``check`` fails in a fork with ``mutation`` (None: nothing) applied; a hang is a failure.

    Raises LookupError when the mutation does not fit the source.
    """
    return next(each_noticed([(mutation, check)], timeout_s))


def each_noticed(cases: Iterable[Case], timeout_s: int = 90) -> Iterator[bool]:
    """``is_noticed`` of each case in turn; two forks run at a time."""
    running: deque[tuple[Mutation | None, int]] = deque()
    for mutation, check in cases:
        pid = os.fork()
        if pid == 0:
            _child(mutation, check, timeout_s)
        running.append((mutation, pid))
        if len(running) == 2:
            yield _verdict(*running.popleft())
    while running:
        yield _verdict(*running.popleft())


def _verdict(mutation: Mutation | None, pid: int) -> bool:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == OUT_OF_DATE:
        raise LookupError(f"{mutation and mutation.name}: its text does not stand once in the source")
    return status != 0


def _child(mutation: Mutation | None, check: Callable[[], object], timeout_s: int) -> None:
    status = OUT_OF_DATE
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        # A mutant that hangs is noticed by the time; the check alone may be slow on a busy machine.
        signal.alarm(timeout_s if mutation is not None else 10 * timeout_s)
        if mutation is not None:
            apply(mutation)
        status = 1
        check()
        status = 0
    except BaseException:
        pass  # the exit status shows it
    finally:
        os._exit(status)

"""Compiles grammars of clients in a separate process, so that a hostile grammar can end only that process.

Run as a module it is that process: the first line of its input describes the tokenizer, each further one is a grammar
to be tried, and each line of its output is a verdict.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from typing import Any, TextIO

from sglang.srt.constrained.llguidance_backend import GrammarError, GuidanceBackend, grammar_of
from sglang.srt.utils.limits import MAX_GRAMMAR_BYTES, MAX_GRAMMAR_CPU_S

# The process may wait longer for a processor than it may use one.
_TIMEOUT_S = 60.0
_END_S = 1.0
_MAX_MESSAGE_CHARS = 600


class CheckerError(Exception):
    """The process that checks grammars failed for a reason that says nothing of the grammar."""


class GrammarChecker:
    """Asks the process, which is started at the first call and where a grammar ended it. For one thread at a time.

    ``tokenizer_json`` gives the text of tokenizer.json; ``json_options`` as of ``grammar_of``.
    """

    def __init__(self, tokenizer_json: Callable[[], str], vocab_size: int, json_options: dict[str, Any]) -> None:
        self._tokenizer_json = tokenizer_json
        self._options = {"vocab_size": vocab_size, "json_options": json_options}
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, kind: str, source: str) -> str:
        """The grammar, as text, for ``source``, if it compiles within the limits. Raises GrammarError, CheckerError."""
        if self._process is not None and self._process.poll() is not None:
            self._end(self._process)  # something ended it while it had nothing to do
        if self._process is None:
            self._process = self._launch()
        try:
            verdict = self._ask(self._process, {"kind": kind, "source": source})
        except (OSError, ValueError):  # it has ended, or said half a line before it did
            raise _failure(self._end(self._process)) from None
        if "error" in verdict:
            raise GrammarError(verdict["error"])
        grammar: str = verdict["grammar"]
        return grammar

    def close(self) -> None:
        if self._process is not None:
            self._end(self._process)

    def _launch(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sglang.srt.constrained.grammar_checker"]
        try:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            raise CheckerError(f"the process that checks grammars did not start: {error}") from None
        try:
            self._ask(process, {"tokenizer": self._tokenizer_json(), **self._options})
        except (OSError, ValueError):
            status = self._end(process)
            raise CheckerError(f"the process that checks grammars did not start (status {status})") from None
        return process

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], message: dict[str, Any]) -> dict[str, str]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
        with DefaultSelector() as selector:
            selector.register(process.stdout, EVENT_READ)
            if not selector.select(_TIMEOUT_S):
                raise TimeoutError
        verdict: dict[str, str] = json.loads(process.stdout.readline())
        return verdict

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        """End the process, and return its status."""
        self._process = None
        assert process.stdin is not None and process.stdout is not None
        with suppress(OSError):  # what was not written yet
            process.stdin.close()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
        process.stdout.close()
        return process.wait()


def _failure(status: int) -> Exception:
    """What it means that the process ended with ``status`` while it compiled a grammar."""
    if status == -signal.SIGPROF:
        return GrammarError(f"compiling it takes more than {MAX_GRAMMAR_CPU_S:g} s")
    if status == -signal.SIGABRT:
        return GrammarError(f"compiling it takes more than {MAX_GRAMMAR_BYTES >> 20} MiB")
    if status == -signal.SIGKILL:
        return CheckerError("the process that checks grammars was killed: this machine is short of memory, or too busy")
    return GrammarError(f"compiling it ended the process that tries grammars (status {status})")


def _verdict(backend: GuidanceBackend, question: dict[str, str], json_options: dict[str, Any]) -> dict[str, str]:
    try:
        grammar = grammar_of(question["kind"], question["source"], json_options)
        backend.compile(grammar)
    except (GrammarError, MemoryError) as error:
        message = str(error) or f"compiling it takes more than {MAX_GRAMMAR_BYTES >> 20} MiB"
        return {"error": message[:_MAX_MESSAGE_CHARS]}
    return {"grammar": grammar}


def _address_space() -> int:
    """Bytes of it that this process has."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[0]) * resource.getpagesize()


def _say(verdict: dict[str, str]) -> None:
    print(json.dumps(verdict), flush=True)


def main(lines: TextIO) -> int:
    # A grammar that ends this process does so without a core file; Ctrl-C is for the server.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start = json.loads(lines.readline())
    try:
        backend = GuidanceBackend(start["tokenizer"], start["vocab_size"], [0])
    except GrammarError as error:
        print(error, file=sys.stderr)
        return 1
    most = _address_space() + MAX_GRAMMAR_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    _say({})
    for line in lines:
        signal.setitimer(signal.ITIMER_PROF, MAX_GRAMMAR_CPU_S)
        verdict = _verdict(backend, json.loads(line), start["json_options"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(verdict)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.stdin))

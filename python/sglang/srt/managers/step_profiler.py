"""Traces of a scheduler's steps by torch.profiler, started and stopped by messages."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sglang.srt.managers.io_struct import ProfileReqInput, ProfileReqOutput

logger = logging.getLogger(__name__)


class StepProfiler:
    """One profile at a time in ``folder``, named by request and rank ``label``; ``num_steps``: of the scheduler."""

    def __init__(self, folder: str | None, label: str, num_steps: Callable[[], int]) -> None:
        self._folder = folder
        self._label = label
        self._num_steps = num_steps
        self._profile: profile | None = None
        self._path = Path()
        self._last_step: int | None = None

    def handle(self, message: ProfileReqInput) -> ProfileReqOutput:
        """Start or stop, as the message says."""
        try:
            told = self._start(message) if message.starts else self._stop()
        except (OSError, RuntimeError) as error:
            self._profile = None
            return ProfileReqOutput(seq=message.seq, success=False, message=f"The profile failed: {error}.")
        return ProfileReqOutput(seq=message.seq, success=not told, message=told or str(self._path))

    def turn(self) -> None:
        """Stop after the requested number of steps."""
        if self._last_step is not None and self._num_steps() >= self._last_step:
            try:
                self._stop()
            except (OSError, RuntimeError) as error:
                logger.error("the profile failed: %s", error)

    def _start(self, message: ProfileReqInput) -> str:
        """Begin; returns why that is impossible, or ""."""
        if self._folder is None:
            return "The server was started without --profile-dir, so that it writes no traces."
        if self._profile is not None:
            return f"A profile runs already, and goes to {self._path}: stop it first."
        if problem := folder_problem(self._folder):
            return f"{problem}."
        self._path = Path(self._folder) / f"{message.name}-{self._label}.trace.json.gz"
        activities = [ProfilerActivity.CPU] if "CPU" in message.activities else []
        if "GPU" in message.activities and torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        if not activities:
            return "Of the activities only GPU is left, and this server runs on none."
        self._profile = profile(
            activities=activities, with_stack=message.with_stack, record_shapes=message.record_shapes
        )
        self._profile.start()
        self._last_step = None if message.num_steps is None else self._num_steps() + message.num_steps
        logger.info("profiling begins, to %s", self._path)
        return ""

    def _stop(self) -> str:
        if self._profile is None:
            return "No profile runs."
        running, self._profile, self._last_step = self._profile, None, None
        running.stop()
        _write(running, self._path)
        logger.info("profile written: %s", self._path)
        return ""


def _write(trace: profile, path: Path) -> None:
    """Write ``trace`` as compressed JSON, next to which it needs room for the plain text. Raises OSError.

    Of a disk that is full torch only logs: it leaves a part of the text, or none.
    """
    plain = path.with_suffix("")
    try:
        plain.touch()
        trace.export_chrome_trace(str(plain))
        with plain.open("rb") as text, gzip.open(path, "wb") as packed:
            shutil.copyfileobj(text, packed)
            text.seek(max(0, text.tell() - 16))
            if not text.read().rstrip().endswith(b"}"):
                raise OSError(f"torch could not write all of {plain}: is the disk full?")
    except OSError:
        path.unlink(missing_ok=True)
        raise
    finally:
        for left in (plain, plain.with_suffix(".json.tmp")):
            left.unlink(missing_ok=True)


def folder_problem(folder: str) -> str:
    """Why traces cannot be written to ``folder``, which is created if missing; "" if they can."""
    try:
        os.makedirs(folder, exist_ok=True)
        probe = Path(folder) / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"--profile-dir {folder!r} cannot be written to: {error.strerror}"
    return ""

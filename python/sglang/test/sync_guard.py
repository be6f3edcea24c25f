"""Holds the steps of an engine to never waiting for a GPU, by torch's own guard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang.srt.managers.tp_worker import TpModelWorker


def forbid_waits(worker: TpModelWorker, prompts: bool = True) -> None:
    """From here on a forward or a choice of tokens that waits for the device raises; prompts: those of prompts too."""
    forward = worker.forward

    def strict(run: Callable[..., Any], *args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def strict_forward(batch: Any) -> Any:
        if batch.input_ids is not None and not prompts:
            return forward(batch)
        launched = strict(forward, batch)
        sample = launched.sample
        launched.sample = lambda *args: strict(sample, *args)
        return launched

    worker.forward = strict_forward  # type: ignore[method-assign]

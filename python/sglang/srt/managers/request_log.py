"""The log entries of a request: when it arrived, and how it ended."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TextIO

import msgspec

from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.request_state import RequestState
from sglang.srt.utils.logging_config import shown

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

PARAMETERS, BEGINNINGS, EVERYTHING = 1, 2, 3
_MAX_CHARS = 2048
_MAX_ID_CHARS = 128
_MAX_PARAMS_CHARS = 512


class RequestLog:
    """Two entries per request, as log or JSON lines; clients' text is escaped, and cut below the highest level."""

    def __init__(self, args: ServerArgs) -> None:
        self._enabled = args.log_requests
        self._level = args.log_requests_level
        self._json: TextIO | None = sys.stderr if args.log_requests_format == "json" else None

    def received(self, obj: GenerateReqInput, states: Sequence[RequestState]) -> None:
        """Log that ``obj`` was sent to a scheduler."""
        if not self._enabled:
            return
        rids = [self._cut(state.rid, _MAX_ID_CHARS) for state in states]
        told: dict[str, Any] = {"rids": rids, "stream": bool(obj.stream)}
        if self._level >= PARAMETERS:
            told["sampling_params"] = self._cut(obj.sampling_params, _MAX_PARAMS_CHARS)
        if self._level >= BEGINNINGS:
            given = {"text": obj.text, "input_ids": obj.input_ids}
            told.update((name, self._cut(value)) for name, value in given.items() if value is not None)
        self._say("Receive", told)

    def finished(self, state: RequestState) -> None:
        """Log that a request has ended; without a reason if its reader left."""
        if not self._enabled:
            return
        reason = None if state.finish_reason is None else msgspec.to_builtins(state.finish_reason)
        rid = self._cut(state.rid, _MAX_ID_CHARS)
        told: dict[str, Any] = {"rid": rid, "reason": reason, "tokens": len(state.output_ids)}
        if state.latency is not None:
            told["e2e_latency"] = round(state.latency, 6)
        if self._level >= BEGINNINGS:
            told["output"] = self._cut(state.text)
        self._say("Finish", told)

    def _say(self, event: str, told: dict[str, Any]) -> None:
        if self._json is None:
            logger.info("%s: %s", event, ", ".join(f"{name}={value!r}" for name, value in told.items()))
        else:
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            with contextlib.suppress(OSError):  # as with other log lines: a full disk or a closed pipe
                print(json.dumps({"time": now, "event": event.lower(), **told}), file=self._json, flush=True)

    def _cut(self, value: Any, most: int = _MAX_CHARS) -> Any:
        """``value``, or a text with its beginning if it is longer than the level allows."""
        if self._level >= EVERYTHING:
            return value
        if isinstance(value, str):
            return value if len(value) <= most else f"{value[:most]}... ({len(value)} characters)"
        words = repr(value) if len(value or ()) <= most else ""
        return value if words and len(words) <= most else shown(value)

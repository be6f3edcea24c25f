"""The definition of an endpoint: its handler and its documentation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """One path. ``body`` and ``result`` are msgspec types of JSON; None means no body, and a result that is no JSON.

    ``chunk`` is the type of a streamed event. ``aliases`` are other paths with the same answer. Without ``summary``, an
    endpoint is not described.
    """

    path: str
    methods: tuple[str, ...]
    handler: Handler
    tag: str = ""
    summary: str = ""
    body: Any = None
    result: Any = None
    chunk: Any = None
    # Query parameters: name and what it does.
    query: tuple[tuple[str, str], ...] = ()
    aliases: tuple[str, ...] = ()
    # Whether a GET changes nothing, so that a HEAD may be answered like it.
    safe: bool = True
    # Whether its requests wait in the queue, so that a full queue refuses them without reading the body.
    is_queued: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path, *self.aliases)

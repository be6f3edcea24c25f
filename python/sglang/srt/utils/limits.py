"""Every fixed limit on what a client, or a checkpoint, may ask of the server. ``/server_info`` shows them.

Units stand in the names; without one, a limit counts things. Limits that an operator may have to change are flags
(``server_args_http.py``).
"""

from __future__ import annotations

# Requests that wait for a place, over HTTP, where --max-queued-requests is not given.
MAX_QUEUED_REQUESTS = 2048


def shown() -> dict[str, float]:
    """All limits by name, in lower case."""
    return {name.lower(): value for name, value in globals().items() if name.isupper()}

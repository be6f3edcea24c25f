"""Every fixed limit on what a client, or a checkpoint, may ask of the server. ``/server_info`` shows them.

Units stand in the names; without one, a limit counts things. Limits that an operator may have to change are flags
(``server_args_http.py``).
"""

from __future__ import annotations

# Requests that wait for a place, over HTTP, where --max-queued-requests is not given.
MAX_QUEUED_REQUESTS = 2048

# Bytes that the bodies of all unfinished requests may come to; more than --max-request-bytes in any case.
MAX_BODY_BYTES_IN_FLIGHT = 512 << 20
# Seconds for which the rest of a refused body is read and dropped, so that the client gets to read the refusal.
LINGER_S = 5

# Long texts that are tokenized at once; others wait. Each may take some 130 bytes per token for a moment.
MAX_LONG_TEXTS_AT_ONCE = 4


def shown() -> dict[str, float]:
    """All limits by name, in lower case."""
    return {name.lower(): value for name, value in globals().items() if name.isupper()}

"""Errors of native requests, in the names that a client of the OpenAI endpoints has sent."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sglang.srt.managers.request_input import RequestError

_FIRST = re.compile(r"\w*")
# Other names, such as those of constraints, are ordinary words too: they are replaced only where a message begins.
_NATIVE = re.compile(
    r"\b(max_new_tokens|min_new_tokens|sampling_seed|input_ids|top_logprobs_num|logprob_start_len)\b", re.ASCII
)


@contextmanager
def in_own_names(fields: tuple[str, ...], renamed: Mapping[str, str]) -> Iterator[None]:
    """Raise an error of the request with the names ``renamed``: native -> sent; ``fields`` are those of the body.

    A message about a field begins with its name, which becomes the error's ``param`` if it has none.
    """
    try:
        yield
    except RequestError as error:
        if error.status_code != 400:
            raise
        message = error.message
        match = _FIRST.match(message)
        first = match[0] if match else ""
        if first in renamed and not message.startswith("[", len(first)):  # places in a list may differ
            message = renamed[first] + message[len(first) :]
        message = _NATIVE.sub(lambda name: renamed.get(name[0], name[0]), message)
        param = renamed.get(error.param or first, error.param or first)
        known = param if error.param or param.partition(".")[0] in fields else None
        raise RequestError(message, 400, error.err_type, error.headers, param=known, code=error.code) from None

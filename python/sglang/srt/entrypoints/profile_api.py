"""``/start_profile`` and ``/stop_profile``: traces of every scheduler's steps, written to ``--profile-dir``."""

from __future__ import annotations

import functools
import re
import time
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from sglang.srt.entrypoints.context import ServerContext
from sglang.srt.entrypoints.endpoint import Endpoint
from sglang.srt.entrypoints.http_io import read_body
from sglang.srt.managers.io_struct import ProfileReqInput
from sglang.srt.managers.request_input import RequestError
from sglang.srt.managers.tokenizer_manager import TokenizerManager

_PREFIX = re.compile(r"[\w.-]{1,64}", re.ASCII)
_ACTIVITIES = ("CPU", "GPU")


class ProfileBody(msgspec.Struct, forbid_unknown_fields=True):
    """``num_steps`` ends the profile automatically; upstream's other fields are accepted if they ask for nothing
    more."""

    num_steps: int | None = None
    activities: list[str] | None = None
    with_stack: bool | None = None
    record_shapes: bool | None = None
    profile_prefix: str | None = None
    output_dir: str | None = None
    start_step: int | None = None
    profile_by_stage: bool | None = None
    merge_profiles: bool | None = None
    profile_stages: list[str] | None = None


async def start_profile(manager: TokenizerManager, body: ProfileBody) -> list[str]:
    """Begin, on every rank; the files of the first ranks. Raises RequestError."""
    folder = _folder(manager)
    if body.output_dir not in (None, folder):
        raise RequestError(f"Traces are written to --profile-dir, {folder!r}. Remove the field.", param="output_dir")
    for name in ("start_step", "profile_by_stage", "merge_profiles", "profile_stages"):
        if getattr(body, name):
            raise RequestError(f"{name} is not supported: a profile begins at once and contains all steps.", param=name)
    if body.num_steps is not None and body.num_steps < 1:
        raise RequestError(f"num_steps must be at least 1, got {body.num_steps}.", param="num_steps")
    activities = list(_ACTIVITIES) if body.activities is None else body.activities
    if not activities or not set(activities) <= set(_ACTIVITIES):
        raise RequestError(f"activities must be a list of CPU and GPU, got {activities!r:.100}.", param="activities")
    prefix = body.profile_prefix
    if prefix is not None and not _PREFIX.fullmatch(prefix):
        raise RequestError(
            "profile_prefix must be up to 64 of the characters A-Z a-z 0-9 _ . -", param="profile_prefix"
        )
    name = f"{prefix}-{time.time():.3f}" if prefix else f"{time.time():.3f}"
    options: dict[str, Any] = {"with_stack": bool(body.with_stack), "record_shapes": bool(body.record_shapes)}
    options |= {"num_steps": body.num_steps, "activities": activities}
    return await manager.profile(functools.partial(ProfileReqInput, starts=True, name=name, **options))


async def stop_profile(manager: TokenizerManager) -> list[str]:
    """End, and write the traces; the files of the first ranks. Raises RequestError."""
    _folder(manager)
    return await manager.profile(functools.partial(ProfileReqInput, starts=False))


def _folder(manager: TokenizerManager) -> str:
    folder = manager.server_args.profile_dir
    if folder is None:
        raise RequestError("Profiles need a folder: start the server with --profile-dir FOLDER.")
    return folder


class ProfileApi:
    """Handlers over one server context."""

    def __init__(self, context: ServerContext):
        self._manager = context.manager

    def endpoints(self) -> list[Endpoint]:
        """Both of them."""
        about, both = "Administration", ("GET", "POST")
        return [
            Endpoint(
                "/start_profile", both, self.start, about, "Trace the steps of the schedulers.", body=ProfileBody,
                safe=False,
            ),
            Endpoint("/stop_profile", both, self.stop, about, "Write the trace to --profile-dir.", safe=False),
        ]  # fmt: skip

    async def start(self, request: Request) -> Response:
        is_empty = request.headers.get("content-length", "0") == "0" and "transfer-encoding" not in request.headers
        body = ProfileBody()
        if not is_empty:
            body, _ = await read_body(request, ProfileBody, self._manager.unknown_fields)
        files = await start_profile(self._manager, body)
        return _told("Profiling, to", files)

    async def stop(self, _: Request) -> Response:
        return _told("Written:", await stop_profile(self._manager))


def _told(what: str, files: list[str]) -> Response:
    return Response(f"{what} {', '.join(files)}\n", media_type="text/plain")

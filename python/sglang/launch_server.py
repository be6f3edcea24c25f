"""``python -m sglang.launch_server``: serve a model over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def serve(argv: Sequence[str]) -> NoReturn:
    """Serve a command line (without the program's name); ends the process, with the exit status, once torch is loaded.

    Loading torch takes seconds: what is wrong with flags, variables or the port is said before.
    """
    from sglang.srt.arg_groups.parse import read
    from sglang.srt.server_args import exit_with_errors

    parsed = read(argv)
    if errors := parsed.start_errors():
        exit_with_errors(errors)
    if sys.stderr.isatty():
        print("starting: loading torch ...", file=sys.stderr, flush=True)
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.utils.common import end_process

    end_process(launch_server(parsed))


def main() -> NoReturn:
    serve(sys.argv[1:])


if __name__ == "__main__":
    main()

"""``python -m sglang.launch_server``: serve a model over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def serve(argv: Sequence[str]) -> int:
    """Serve a command line (without the program's name); returns the exit status.

    Loading torch takes seconds: what is wrong with flags, variables or the port is said before.
    """
    from sglang.srt.server_args import exit_with_errors
    from sglang.srt.server_args_verdict import early_errors

    if errors := early_errors(argv):
        exit_with_errors(errors)
    if sys.stderr.isatty():
        print("starting: loading torch ...", file=sys.stderr, flush=True)
    from sglang.srt.entrypoints.http_server import launch_server

    return launch_server(argv)


def main() -> int:
    return serve(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

"""``python -m sglang.launch_server``: serve a model over HTTP."""

from __future__ import annotations

import sys


def main() -> int:
    from sglang.srt.entrypoints.http_server import launch_server

    return launch_server(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())

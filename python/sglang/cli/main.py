"""The console script ``sglang``: ``serve`` and ``version``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sglang.version import __version__

USAGE = """usage: sglang serve [MODEL] [flags]   serve a model; the flags are those of python -m sglang.launch_server
       sglang version                 print the version
"""


def git_revision() -> str | None:
    """First seven characters of the checkout's revision, None outside of a checkout."""
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short=7", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None if result.returncode == 0 else None


def serve_arguments(argv: Sequence[str]) -> list[str]:
    """Flags of ``launch_server`` for ``sglang serve ARGV``: a leading model becomes ``--model-path``."""
    if argv and not argv[0].startswith("-"):
        return ["--model-path", argv[0], *argv[1:]]
    return list(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else ""
    if command == "serve":
        from sglang.srt.entrypoints.http_server import launch_server

        return launch_server(serve_arguments(words[1:]))
    if command == "version":
        revision = git_revision()
        print(f"sglang-amd {__version__}" + (f" ({revision})" if revision else ""))
        return 0
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "generate":
        print("error: 'sglang generate' serves diffusion models in upstream and does not exist here.", file=sys.stderr)
    elif command:
        print(f"error: unknown subcommand {command!r}.", file=sys.stderr)
    print(USAGE, end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

"""The console script ``sglang``: ``serve`` and ``version``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sglang.version import version_line

USAGE = """usage: sglang serve [MODEL] [flags]   serve a model; the flags are those of python -m sglang.launch_server
       sglang version                 print the version
"""


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
        from sglang.launch_server import serve

        serve(serve_arguments(words[1:]))
    if command in ("version", "--version", "-V"):
        print(version_line())
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

"""``python -m sglang.plan``: where the memory of each rank would go, and what to set, without a GPU or a launch."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sglang.srt.arg_groups.parse import read
from sglang.srt.server_args import exit_with_errors

# What is planned for, and the architecture that is taken; no device is touched.
ARCHITECTURES = {"hip": "gfx942", "cuda": "sm_90", "cpu": "cpu"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sglang.plan",
        description="Plan the memory of each rank. Takes every flag of launch_server, and resolves them as it does.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--gpu-memory-gb", type=float, default=192.0, help="memory of one device in GiB (default: 192, an MI300X)"
    )
    parser.add_argument(
        "--platform", choices=ARCHITECTURES, default="hip", help="what it is planned for (default: hip)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the plan; the status is 0 if it fits, 2 if a setting is wrong or memory is short."""
    options, flags = make_parser().parse_known_args(argv)
    parsed = read(flags)
    if parsed.errors:
        exit_with_errors(parsed.errors)
    from sglang.plan_report import report

    return report(options, parsed, ARCHITECTURES[options.platform])


if __name__ == "__main__":
    sys.exit(main())

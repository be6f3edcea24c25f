"""Refuses to run together with upstream's distribution, whose files would mix with ours under one import name."""

from __future__ import annotations

import sys
from importlib import metadata


def upstream_distribution() -> str | None:
    """Version of an installed distribution named ``sglang``, which is upstream's; ours is ``sglang-amd``."""
    try:
        return metadata.distribution("sglang").version
    except metadata.PackageNotFoundError:
        return None


def refuse_upstream_distribution() -> None:
    """Exit with status 2 when upstream's distribution is installed in this environment."""
    version = upstream_distribution()
    if version is not None:
        print(
            f"error: the distribution 'sglang' {version} (upstream) is installed next to 'sglang-amd'. Both own the "
            "import name 'sglang', so their files mix. Run 'pip uninstall sglang', reinstall sglang-amd, or use a "
            "virtual environment of its own.",
            file=sys.stderr,
        )
        sys.exit(2)

"""The version of the distribution sglang-amd."""

from __future__ import annotations

from pathlib import Path

__version__ = "0.1.0"


def version_line() -> str:
    """Name and version, and in a checkout the first seven characters of its revision."""
    import subprocess  # only who asks for the version pays for it

    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "--short=7", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return f"sglang-amd {__version__}"
    revision = result.stdout.strip() if result.returncode == 0 else ""
    return f"sglang-amd {__version__}" + (f" ({revision})" if revision else "")

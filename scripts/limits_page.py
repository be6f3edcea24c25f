"""The documentation page of the fixed limits: names, values and comments of ``srt/utils/limits.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sglang.srt.utils import limits

_HEAD = """# Limits

This page is generated from `python/sglang/srt/utils/limits.py` by `scripts/gen_docs.py`. The limits are fixed, and
`/server_info` shows them under `limits`. Limits that an operator sets are flags, in
[server arguments](../advanced_features/server_arguments.md).

| Limit | Value | |
| --- | --- | --- |"""


def render() -> str:
    return "\n".join([_HEAD, *_rows()]) + "\n"


def _rows() -> Iterator[str]:
    """A comment belongs to the name right below it."""
    shown, comment = limits.shown(), []
    for line in Path(limits.__file__).read_text(encoding="utf-8").splitlines():
        name = line.split(" ")[0].removesuffix(":").lower()
        if line.startswith("# "):
            comment.append(line[2:])
            continue
        if name in shown:
            yield f"| `{name}` | {shown[name]:,} | {' '.join(comment)} |"
        comment = []

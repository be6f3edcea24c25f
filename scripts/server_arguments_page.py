"""The documentation page of the command line, made from the fields and from the table of upstream's flags."""

from __future__ import annotations

from collections.abc import Iterable

from sglang.srt.arg_groups.fields import FieldSpec
from sglang.srt.arg_groups.upstream import UpstreamFlag, distinct_flags
from sglang.srt.server_args import specs

_HEAD = """# Server Arguments

This page is generated from `python/sglang/srt/server_args*.py` by `scripts/gen_docs.py`. The flags are those of
`python -m sglang.launch_server` and `sglang serve`; their names and meanings are upstream sglang's.

## Common launch commands

- Serve the small model that ships with the package, on any machine:

  ```bash
  python -m sglang.launch_server
  ```

- Serve a model folder over two tensor-parallel ranks:

  ```bash
  python -m sglang.launch_server --model-path /models/DeepSeek-V2-Lite --tp 2
  ```

- Take flags from a file. Its keys are long flag names with dashes; the command line wins over the file, and the file
  over the defaults:

  ```bash
  python -m sglang.launch_server --config server.yaml --port 30001
  ```

- Ask what a command line would do. All flags, all `SGLANG_` variables and the model's `config.json` are checked
  together, and each setting that is chosen for you is printed with its reason. The exit status is 0 when the server
  would start, and 2 otherwise. No weights are read: a folder with only a `config.json` is enough.

  ```bash
  python -m sglang.launch_server --model-path /models/Qwen3.5-35B-A3B --tp 8 --dry-run
  ```

A flag may be shortened as long as it stays unique. Numbers of tokens also take the suffixes `k`, `M`, `G` (decimal) and
`Ki`, `Mi`, `Gi` (binary). A wrong command line is answered with every problem at once and exit status 2.
"""
_REFUSED = """## Flags of upstream that are refused

Each would change what is computed, who may talk to the server, or the topology, and is not implemented here. In
brackets: values that ask for nothing and are accepted.

| Argument | Reason |
| --- | --- |"""
_NO_EFFECT = """## Flags of upstream that have no effect

They are accepted, so that published command lines start, and named once at start.

| Argument | Reason |
| --- | --- |"""


def render() -> str:
    """The whole page."""
    parts = [_HEAD]
    for group in dict.fromkeys(spec.arg.group for spec in specs()):
        parts.append(f"## {group}\n\n| Argument | Description | Defaults | Options |\n| --- | --- | --- | --- |")
        parts[-1] += "".join("\n" + _row(spec) for spec in specs() if spec.arg.group == group) + "\n"
    for head, refused in ((_REFUSED, True), (_NO_EFFECT, False)):
        rows = _reasons(flag for flag in distinct_flags() if flag.refused == refused)
        parts.append(head + "".join(f"\n| {names} | {reason} |" for reason, names in rows.items()) + "\n")
    return "\n".join(parts)


def _row(spec: FieldSpec) -> str:
    names = "<br>".join(f"`{flag}`" for flag in spec.flags)
    cells = (names, spec.arg.help, _default(spec), _options(spec))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _default(spec: FieldSpec) -> str:
    if spec.kind == "bool":
        return "`False`"
    if spec.default in (None, ""):
        return f"`None` ({spec.arg.auto})" if spec.arg.auto else "`None`"
    return f"`{spec.default}`"


def _options(spec: FieldSpec) -> str:
    if spec.kind == "bool":
        return "bool flag (set to enable)"
    if spec.choices:
        return ", ".join(f"`{choice}`" for choice in spec.choices)
    kind = "List[int]" if spec.kind == "ints" else spec.kind
    return f"Type: {kind}" + (f"; {spec.bounds()}" if spec.bounds() else "")


def _reasons(flags: Iterable[UpstreamFlag]) -> dict[str, str]:
    """Reason -> the flags that share it, as one cell."""
    cells: dict[str, list[str]] = {}
    for flag in flags:
        names = ", ".join(f"`{name}`" for name in flag.names)
        harmless = f" ({', '.join(f'`{value}`' for value in flag.harmless)})" if flag.harmless else ""
        cells.setdefault(flag.reason, []).append(names + harmless)
    return {reason: ", ".join(names) for reason, names in cells.items()}

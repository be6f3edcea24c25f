"""``python -m sglang.kernels``: every op, what would run here, and why the others would not.

``--amd-report`` compiles every Triton kernel for AMD instead, with no GPU, and prints what each needs and which of the
walked models launch it.
"""

from __future__ import annotations

import argparse
import json
import sys


def _amd_report(as_json: bool, update: bool) -> int:
    from sglang.kernels.registry import probe_package

    reason = probe_package("triton")
    if reason is not None:
        print(f"error: --amd-report compiles with Triton, which does not import: {reason}", file=sys.stderr)
        return 2
    from sglang.kernels.amd.gate import report
    from sglang.srt.model_executor.shape_walk import walk_models

    return report(as_json, update, walk_models)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang.kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--amd-report", action="store_true", help="compile the Triton kernels for gfx942 and gfx950")
    parser.add_argument("--amd-update", action="store_true", help="the same, and record the rows as the new table")
    arguments = parser.parse_args()
    if arguments.amd_report or arguments.amd_update:
        return _amd_report(arguments.json, arguments.amd_update)
    return _table(arguments.json)


def _table(as_json: bool) -> int:
    # Loading torch takes seconds: the command line has been read before.
    from sglang.kernels.registry import REGISTRY, KernelConfigError
    from sglang.srt.environ import EnvError
    from sglang.srt.platforms import PlatformError, current_platform

    try:
        REGISTRY.freeze()
        platform = current_platform.describe()
    except (KernelConfigError, PlatformError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = REGISTRY.report()
    if as_json:
        print(json.dumps({"platform": platform, "ops": rows}, indent=1))
        return 0
    print(f"platform: {platform}")
    for row in rows:
        print(f"{row['op']:<32} {row['chosen']}{' (forced)' if row['forced'] else ''}")
        for name, verdict in row["implementations"].items():
            if name != row["chosen"]:
                print(f"{'':<32}   {name}: {verdict}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

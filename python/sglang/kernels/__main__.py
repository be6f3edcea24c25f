"""``python -m sglang.kernels``: every op, what would run here, and why the others would not.

``--amd-report`` compiles every Triton kernel for AMD instead, with no GPU, and prints what each needs and which of the
walked models launch it. It needs a checkout.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys


def _amd_report(as_json: bool, update: bool) -> int:
    from sglang.kernels.registry import probe_package

    reason = probe_package("triton")
    if reason is not None:
        print(f"error: --amd-report compiles with Triton, which does not import: {reason}", file=sys.stderr)
        return 2
    try:
        gate = importlib.import_module("sglang.test.amd_gate.gate")
        shape_walk = importlib.import_module("sglang.test.amd_gate.shape_walk")
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("sglang.test"):
            raise
        print("error: --amd-report runs in a checkout: the installed package has no sglang.test", file=sys.stderr)
        return 2
    status: int = gate.report(as_json, update, shape_walk.walk_models)
    return status


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

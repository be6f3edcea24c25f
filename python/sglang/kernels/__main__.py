"""``python -m sglang.kernels``: every op, what would run here, and why the others would not."""

from __future__ import annotations

import argparse
import json
import sys

from sglang.kernels.registry import REGISTRY, KernelConfigError
from sglang.srt.environ import EnvError
from sglang.srt.platforms import PlatformError, current_platform


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang.kernels", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    try:
        REGISTRY.freeze()
        platform = current_platform.describe()
    except (KernelConfigError, PlatformError, EnvError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = REGISTRY.report()
    if arguments.json:
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

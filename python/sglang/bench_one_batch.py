"""Time one static batch on the model itself, without server or scheduler: prefill latency and decode latency.

    python -m sglang.bench_one_batch --batch-size 1 8 --input-len 128 --output-len 32
    python -m sglang.bench_one_batch --correctness-test

Every flag of launch_server is accepted too; without --model-path the embedded model is used. A record for each case is
appended to --result-filename as one line of JSON.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sglang.bench_utils.one_batch_flags import read_arguments
from sglang.srt.managers.process_launch import SPIN_COUNT


def main(argv: Sequence[str] | None = None) -> int:
    # As in a server's scheduler process; read when torch is loaded, so it is set before that.
    os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    args = read_arguments(__doc__, argv)
    # Loading torch takes seconds: the command line has been read before.
    from sglang.bench_utils.one_batch_cli import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())

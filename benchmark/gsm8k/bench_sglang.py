"""Accuracy and throughput on word problems of a local file, sent to a running server.

    python -m sglang.launch_server --model-path MODEL &
    python benchmark/gsm8k/bench_sglang.py --data-path test.jsonl --num-questions 200

Without --data-path the questions of smoke.jsonl are sent: they show that the benchmark works, and measure no model. A
record is appended to --result-file as one line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sglang.test.few_shot_gsm8k import EvalError, make_parser, run_eval

SMOKE_FILE = Path(__file__).resolve().parent / "smoke.jsonl"


def main() -> int:
    parser = make_parser(__doc__, str(SMOKE_FILE))
    parser.add_argument("--result-file", default="result.jsonl", help="File to append to; empty for none.")
    args = parser.parse_args()
    try:
        result = run_eval(args)
    except EvalError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.result_file:
        record = {
            "task": "gsm8k",
            "backend": "sglang",
            "latency": round(result.latency, 3),
            "accuracy": round(result.accuracy, 3),
            "invalid": round(result.invalid, 3),
            "output_throughput": round(result.output_throughput, 3),
            "num_requests": result.num_questions,
            "other": {"num_questions": args.num_questions, "num_shots": args.num_shots, "parallel": args.parallel},
        }
        with open(args.result_file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The flags of bench_one_batch; loads no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sglang.srt.server_args import ServerArgs


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """The tool's own flags, in addition to those of ServerArgs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("one batch")
    group.add_argument("--run-name", default="default", help="Copied into the records.")
    group.add_argument("--batch-size", type=int, nargs="+", default=[1], help="Requests. Default: 1.")
    group.add_argument("--input-len", type=int, nargs="+", default=[1024], help="Prompt tokens. Default: 1024.")
    group.add_argument("--output-len", type=int, nargs="+", default=[16], help="New tokens. Default: 16.")
    group.add_argument("--result-filename", default="result.jsonl", help="File to append to; empty for none.")
    group.add_argument("--log-decode-step", type=int, default=0, help="Print every Nth decode step too.")
    group.add_argument(
        "--prompt-filename", default="", help="Text file with one prompt per line, instead of random ids."
    )
    group.add_argument("--correctness-test", action="store_true", help="Print tokens and logits instead of times.")
    group.add_argument("--cut-len", type=int, default=4, help="Prompt tokens of the first of two steps. Default: 4.")
    group.add_argument("--profile", action="store_true", help="Write a torch trace of prefill and of one decode step.")
    group.add_argument("--profile-filename-prefix", default="profile", help="Prefix of the names of trace files.")
    ServerArgs.add_cli_args(parser)
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("batch_size", "input_len", "output_len"):
        if min(getattr(args, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {min(getattr(args, name))}")
    if args.cut_len < 1:
        parser.error(f"--cut-len must be at least 1, got {args.cut_len}")


def read_arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with a message if it is wrong."""
    parser = make_parser(description)
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args

"""Entry point of the detokenizer process: no torch, one inbox, one outbox."""

from __future__ import annotations

import sys

from sglang.srt.managers.child_context import parse_child_arguments
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.utils.logging_config import configure_logging


def main() -> int:
    context = parse_child_arguments()
    server_args = context.config.server_args
    configure_logging(server_args.log_level, "detokenizer")
    try:
        manager = DetokenizerManager(server_args, context.config.ipc)
    except Exception as error:
        context.report_error(f"detokenizer: {type(error).__name__}: {error}", user_error=False)
        raise
    with context.serving({}):
        manager.event_loop(context.pulse.beat)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Entry point of the detokenizer process: no torch, one inbox, one outbox."""

from __future__ import annotations

import logging
import sys

from sglang.srt.managers.child_context import parse_child_arguments
from sglang.srt.managers.detokenizer_manager import DetokenizerManager
from sglang.srt.utils.audit import install_unpickle_counter, log_unpickle_count, reset_unpickle_count
from sglang.srt.utils.logging_config import configure_logging

logger = logging.getLogger(__name__)


def main() -> int:
    install_unpickle_counter()
    context = parse_child_arguments()
    server_args = context.config.server_args
    configure_logging(server_args.log_level, "detokenizer")
    try:
        manager = DetokenizerManager(server_args, context.config.ipc)
    except Exception as error:
        context.report_error(f"detokenizer: {type(error).__name__}: {error}", user_error=False)
        raise
    with context.serving():
        context.report_ready({})
        reset_unpickle_count()
        try:
            manager.event_loop(context.pulse.beat)
        finally:
            log_unpickle_count(logger)
    return 0


if __name__ == "__main__":
    sys.exit(main())

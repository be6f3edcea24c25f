"""``python -m sglang.launch_server``: serve a model over HTTP."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from sglang.srt.arg_groups.parse import Parsed, read
from sglang.srt.server_args import ServerArgsError, exit_with_errors

logger = logging.getLogger(__name__)


def serve(argv: Sequence[str]) -> NoReturn:
    """Serve a command line (without the program's name); ends the process, with the exit status, once torch is loaded.

    Loading torch takes seconds: what is wrong with flags, variables or the port is said before.
    """
    # A socket would get the number of a standard stream that the caller has closed, and children would write to it.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free, its own
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode))
    parsed = read(argv)
    if errors := parsed.start_errors():
        exit_with_errors(errors)
    if sys.stderr.isatty():
        print("starting: loading torch ...", file=sys.stderr, flush=True)
    from sglang.srt.utils.common import end_process

    end_process(launch_server(parsed))


def launch_server(request: Parsed) -> int:
    """Everything from a command line that was read to the exit status.

    Status 2 means that a setting is wrong (said on stderr, without a traceback), 1 that something failed, ``EXIT_CUT``
    that requests were cut when the server was told to stop, 128 + N that signal N came during start-up.
    """
    from sglang.srt.arg_groups.plan import plan_launch
    from sglang.srt.entrypoints.http_server import serve_engine
    from sglang.srt.entrypoints.launch import USER_ERRORS, start_engine
    from sglang.srt.entrypoints.shutdown import exit_during_start, handle_stop_signals
    from sglang.srt.managers.process_launch import LaunchError
    from sglang.srt.utils.audit import install_unpickle_counter
    from sglang.srt.utils.distribution import refuse_upstream_distribution
    from sglang.srt.utils.logging_config import configure_logging
    from sglang.srt.utils.network import bind

    install_unpickle_counter()
    refuse_upstream_distribution()
    plan = plan_launch(request)
    args = plan.args
    if args.dry_run:
        print("\n".join(plan.lines()))
        return 2 if plan.errors else 0
    configure_logging(args.log_level, "main")
    handle_stop_signals(exit_during_start)
    processes = None
    try:
        with contextlib.closing(bind(args.host, args.port)) as listener:
            context, processes = start_engine(plan)
            return serve_engine(context, processes, listener)
    except ServerArgsError as error:
        exit_with_errors(error.errors)
    except USER_ERRORS as error:
        exit_with_errors([str(error)])
    except LaunchError as error:
        if error.user_error:
            exit_with_errors([str(error)])
        logger.error("The engine did not start: %s", error)
    finally:
        handle_stop_signals(signal.SIG_IGN)
        if processes is not None:
            processes.shutdown()
    return 1


def main() -> NoReturn:
    serve(sys.argv[1:])


if __name__ == "__main__":
    main()

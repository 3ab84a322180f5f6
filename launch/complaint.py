"""What the command line tells a user who asked for something that cannot be."""

from __future__ import annotations

import sys


def complain(message: object, code: int) -> int:
    """Print a message to standard error and return the exit code."""
    print(f"thinwire: {message}", file=sys.stderr, flush=True)
    return code


def is_ours(error: BaseException) -> bool:
    """Whether thinwire itself raised it: then its message is for the user, and a traceback would only hide it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("thinwire.")

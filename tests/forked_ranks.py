"""Ranks as processes that are forked once torch is imported, which takes seconds that each would spend again."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch.distributed as dist


def fork_ranks(count: int, run: Callable[[int, int], None]) -> list[int]:
    """Run `run(rank, port of a TCPStore)` in as many processes, and return their exit codes.

    The store's thread starts after the last fork: a lock that it held in a fork would never be free in the child.
    """
    receive, send = os.pipe()
    children = []
    for rank in range(count):
        if not (child := os.fork()):
            status = 1
            try:
                run(rank, int(os.read(receive, 8)))
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(send, count * f"{store.port:8}".encode())
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

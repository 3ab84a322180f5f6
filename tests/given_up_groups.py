"""Ends groups that tests leave behind: each has a thread that wakes up a hundred times a second, for ever."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed import ProcessGroup
from torch.distributed.tensor._redistribute import _gen_transform_infos, clear_redistribute_planner_cache
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from thinwire.comm import queue

_given_up: list[tuple[float, ProcessGroup]] = []
_MARGIN_S = 5.0


@contextmanager
def remembered() -> Iterator[None]:
    """Meanwhile note what a CommQueue gives up, and keeps for ever: its end would wait for the operation under way.

    That one ends at the group's own timeout.
    """
    give_up = queue._abandon

    def note(group: ProcessGroup) -> None:
        give_up(group)
        timeout_s = group._get_backend(torch.device("cpu")).options._timeout.total_seconds()
        _given_up.append((time.monotonic() + timeout_s + _MARGIN_S, group))

    queue._abandon = note
    try:
        yield
    finally:
        queue._abandon = give_up


def end_given_up() -> None:
    """End those in which nothing can be under way any more."""
    for entry in [entry for entry in _given_up if entry[0] < time.monotonic()]:
        _given_up.remove(entry)
        ctypes.pythonapi.Py_DecRef(ctypes.py_object(entry[1]))


def forget_meshes() -> None:
    """Empty the caches of DTensor, which keep the meshes of this thread, and those their groups."""
    _clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    clear_redistribute_planner_cache()  # type: ignore[no-untyped-call]
    _gen_transform_infos.cache_clear()
    gc.collect()

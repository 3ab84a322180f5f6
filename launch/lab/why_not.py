"""Whether this machine can hold a lab, found out by building a small one."""

from __future__ import annotations

from functools import cache

from thinwire.launch.lab.client import Lab
from thinwire.launch.lab.spec import LabError


@cache
def why_not(*, delay: bool = False) -> str | None:
    """None where a lab works, else the reason and the remedy, in one sentence.

    delay: ask about labs with delay or loss, which need a TAP device too. Takes about 0.3 s, once.
    """
    try:
        with Lab(hosts=2, rate_bps=1e9, delay_s=0.001 if delay else 0.0):
            return None
    except LabError as error:
        return str(error)


@cache
def why_not_cores() -> str | None:
    """None where a lab can give its ranks processors of their own, else the reason and the remedy, in one sentence."""
    try:
        with Lab(hosts=1, cores_per_rank=0.1):
            return None
    except LabError as error:
        return str(error)

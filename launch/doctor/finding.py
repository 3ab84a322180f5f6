"""What `thinwire doctor` has found out about one topic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One topic's answer.

    state: "ok"; "limited" when something cannot be done here; "problem" when nothing can be trained here.
    found: what is there, short, the same words on every host that has the same.
    shared: whether all ranks of a job should find the same.
    detail: where it is, and what else belongs to it.
    without: what its absence prevents; remedy: how to get it. Both are empty when all is well.
    """

    topic: str
    state: Literal["ok", "limited", "problem"]
    found: str
    shared: bool = False
    detail: str = ""
    without: str = ""
    remedy: str = ""

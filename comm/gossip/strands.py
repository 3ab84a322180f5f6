"""Several scripts of one machine at once: each goes on when what it waits for is there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from thinwire.comm.gossip.port import Script, Wait


@dataclass(eq=False)
class _Strand:
    script: Script[None]
    wait: Wait | None


class Strands:
    """Scripts that run side by side in one thread, in the order in which they were added."""

    def __init__(self) -> None:
        self._strands: list[_Strand] = []

    def add(self, script: Script[None]) -> None:
        """Begin a script at the next advance()."""
        self._strands.append(_Strand(script, None))

    def advance(self, now: float) -> None:
        """Let every script go on as far as it can."""
        moved = True
        while moved:
            moved = False
            for strand in list(self._strands):
                if self._can_go_on(strand, now):
                    moved = True
                    try:
                        strand.wait = next(strand.script)
                    except StopIteration:
                        self._strands.remove(strand)

    def is_ready(self) -> bool:
        """Whether what one of them waits for is there."""
        return any(strand.wait is None or strand.wait.ready() for strand in self._strands)

    @property
    def until(self) -> float:
        """When the first of them goes on in any case."""
        return min((strand.wait.until for strand in self._strands if strand.wait is not None), default=math.inf)

    def cancel(self) -> None:
        """End them where they stand."""
        for strand in self._strands:
            strand.script.close()
        self._strands.clear()

    def _can_go_on(self, strand: _Strand, now: float) -> bool:
        return strand.wait is None or now >= strand.wait.until or strand.wait.ready()

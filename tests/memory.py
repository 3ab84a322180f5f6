"""A sink that keeps a run's records."""

from __future__ import annotations

from thinwire.dist.metrics import Record
from thinwire.dist.stop import StopRequest


class Memory:
    """Keeps the records in `records`, and may ask to stop at one: with `stop`, when it sees that of step `at_step`."""

    def __init__(self, stop: StopRequest | None = None, at_step: int = 0) -> None:
        self.records: list[Record] = []
        self._stop, self._at_step = stop, at_step

    def write(self, record: Record) -> None:
        self.records.append(record)
        if self._stop is not None and record["step"] == self._at_step:
            self._stop.reason = "SIGTERM"

    def close(self) -> None:
        pass

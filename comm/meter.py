"""What every operation put on the wire, by level of the machine."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class Traffic:
    """Totals of one operation or one level. Payload bytes only: what the transport adds is not known here."""

    calls: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    seconds: float = 0.0


class TrafficMeter:
    """Counts payload bytes where they are handed to the transport; never estimates.

    A collective that is made of sends to single peers is counted peer by peer, and each peer's bytes go to the smallest
    level of the machine that holds both ends. Bytes that a rank keeps for itself are not traffic and are not counted.

    Args:
        level_of_peer: for each rank of the job the name of the level that joins it to this rank ("self" for this rank).
    """

    def __init__(self, level_of_peer: Sequence[str]) -> None:
        self._level_of_peer = tuple(level_of_peer)
        self._traffic: dict[tuple[str, str], Traffic] = defaultdict(Traffic)  # (operation, level)
        self._lock = threading.Lock()

    def record(
        self, operation: str, sent_bytes: Mapping[int, int], received_bytes: Mapping[int, int], seconds: float
    ) -> None:
        """Add one collective of a named operation.

        Args:
            operation: name such as "allreduce/bucket0".
            sent_bytes: payload bytes by the job rank that they were sent to.
            received_bytes: payload bytes by the job rank that they came from.
            seconds: from the hand-over to the completion.
        """
        levels = {self._level_of_peer[peer] for peer in (*sent_bytes, *received_bytes)}
        with self._lock:
            for level in levels:
                entry = self._traffic[operation, level]
                entry.calls += 1
                entry.seconds += seconds
            for peer, count in sent_bytes.items():
                self._traffic[operation, self._level_of_peer[peer]].sent_bytes += count
            for peer, count in received_bytes.items():
                self._traffic[operation, self._level_of_peer[peer]].received_bytes += count

    def level_of(self, peer: int) -> str:
        """Name of the level that joins this rank to the job rank `peer`."""
        return self._level_of_peer[peer]

    def sent_bytes(self, prefix: str = "") -> dict[str, int]:
        """Payload bytes sent since the start, by level, of the operations whose name starts with `prefix`."""
        return self._by_level(prefix, "sent_bytes")

    def received_bytes(self, prefix: str = "") -> dict[str, int]:
        """Payload bytes received since the start, by level, of the operations whose name starts with `prefix`."""
        return self._by_level(prefix, "received_bytes")

    def snapshot(self) -> dict[str, Any]:
        """All totals as plain data: {"levels": {level: {...}}, "operations": {operation: {level: {...}}}}."""
        operations: dict[str, dict[str, Any]] = defaultdict(dict)
        with self._lock:
            for (operation, level), entry in self._traffic.items():
                operations[operation][level] = dict(vars(entry))
        levels: dict[str, dict[str, int]] = defaultdict(lambda: {"sent_bytes": 0, "received_bytes": 0})
        for by_level in operations.values():
            for level, entry in by_level.items():
                levels[level]["sent_bytes"] += entry["sent_bytes"]
                levels[level]["received_bytes"] += entry["received_bytes"]
        return {"levels": dict(levels), "operations": dict(operations)}

    def _by_level(self, prefix: str, field: str) -> dict[str, int]:
        totals: dict[str, int] = defaultdict(int)
        with self._lock:
            for (operation, level), entry in self._traffic.items():
                if operation.startswith(prefix):
                    totals[level] += getattr(entry, field)
        return dict(totals)

"""Messages that have arrived and wait to be taken."""

from __future__ import annotations

from collections import deque

from thinwire.comm.gossip.message import Kind, Message


class Inbox:
    """First in, first out, for each sender, kind and stream. Not for several threads at once."""

    def __init__(self) -> None:
        self._queues: dict[tuple[Kind, int], dict[int, deque[tuple[int, Message]]]] = {}
        self._newest: dict[tuple[int, Kind, int], int] = {}
        self._arrivals = 0

    def put(self, source: int, message: Message) -> None:
        """Add what has just arrived."""
        self._arrivals += 1
        queues = self._queues.setdefault((message.kind, message.stream), {})
        queues.setdefault(source, deque()).append((self._arrivals, message))
        key = (source, message.kind, message.stream)
        self._newest[key] = max(self._newest.get(key, -1), message.round)

    def peek(self, source: int, kind: Kind, stream: int = 0) -> Message | None:
        """As Port says."""
        waiting = self._queues.get((kind, stream), {}).get(source)
        return waiting[0][1] if waiting else None

    def take(self, source: int, kind: Kind, stream: int = 0) -> Message:
        """As Port says."""
        queues = self._queues[kind, stream]
        message = queues[source].popleft()[1]
        if not queues[source]:
            del queues[source]
        return message

    def newest(self, source: int, kind: Kind, stream: int = 0) -> int:
        """As Port says."""
        return self._newest.get((source, kind, stream), -1)

    def waiting(self, kind: Kind, stream: int = 0) -> list[int]:
        """As Port says."""
        queues = self._queues.get((kind, stream), {})
        return sorted(queues, key=lambda source: queues[source][0][0])

    def forget(self, source: int) -> None:
        """Drop everything of a machine: another has taken its place."""
        for queues in self._queues.values():
            queues.pop(source, None)
        for key in [key for key in self._newest if key[0] == source]:
            del self._newest[key]

"""How the ranks of a fixed job come to know each other's bytes: all that FixedExchange knows of it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from thinwire.comm.channel import Channel


class Spread(Protocol):
    """Lets every rank know every rank's bytes.

    Attributes: lag, the exchanges that a round takes to become complete beyond the one in which it begins. hops,
        latencies of exchange(); gather_hops, those of gather().
    """

    lag: int
    hops: int
    gather_hops: int

    def exchange(self, channel: Channel, codes: Tensor) -> Tensor:
        """Begin a round with this rank's codes, uint8 (samples,).

        Returns: all ranks' codes of the round that began `lag` exchanges ago, uint8 (ranks, samples), by rank. Zeros
            before there is one.
        """
        ...

    def gather(self, channel: Channel, row: Tensor) -> Tensor:
        """Every rank's row of bytes, by rank, at once."""
        ...

    def sent_bytes(self) -> list[int]:
        """What exchange() sends to each rank."""
        ...

    def gather_bytes(self, row_bytes: int) -> list[int]:
        """What gather() sends to each rank."""
        ...

    def messages(self, hops: int) -> int:
        """How many this rank sends in exchange() or gather(), whose hops these are."""
        ...

    def reset(self) -> None:
        """Forget the rounds that are not complete."""
        ...

    def state(self) -> dict[str, Any]:
        """The rounds that are not complete, as this rank knows them."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take back what state() gave."""
        ...


class AllGather:
    """Every rank sends its bytes straight to every other: one latency, and nothing is under way between two rounds."""

    lag = 0
    hops = gather_hops = 1

    def __init__(self, rank: int, size: int, samples: int) -> None:
        self._rank = rank
        self._size = size
        self._samples = samples

    def exchange(self, channel: Channel, codes: Tensor) -> Tensor:
        """As Spread says."""
        return channel.all_gather_same(codes)

    def gather(self, channel: Channel, row: Tensor) -> Tensor:
        """As Spread says."""
        return channel.all_gather_same(row)

    def sent_bytes(self) -> list[int]:
        """As Spread says."""
        return self.gather_bytes(self._samples)

    def gather_bytes(self, row_bytes: int) -> list[int]:
        """As Spread says."""
        return [0 if rank == self._rank else row_bytes for rank in range(self._size)]

    def messages(self, hops: int) -> int:
        """As Spread says."""
        return self._size - 1

    def reset(self) -> None:
        """Nothing is under way."""

    def state(self) -> dict[str, Any]:
        """Nothing is under way."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Nothing is under way."""
        assert not state

"""A machine of two levels: groups of ranks with fast links inside, and the mean that sends little between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.two_shot import TwoShotMean, split_evenly


class Groups:
    """Which ranks average exactly among themselves, before something thinner goes between the groups.

    Args:
        members: the ranks of each group, ascending; every rank of the channel once, and as many in each.
    Raises:
        ValueError: groups other than these.
    """

    def __init__(self, members: Sequence[Sequence[int]]) -> None:
        self.members = [list(group) for group in members]
        ranks = sorted(r for group in self.members for r in group)
        if not ranks or ranks != list(range(len(ranks))) or any(group != sorted(group) for group in self.members):
            raise ValueError(
                f"exact_within: {self.members}; each rank must be in one group, and the ranks of a group ascend"
            )
        if len({len(group) for group in self.members}) > 1:
            raise ValueError(
                f"exact_within: {self.members} have {', '.join(str(len(group)) for group in self.members)} ranks; "
                "averaging in two levels needs equally many in each group: start the job so, or give null"
            )

    @property
    def local_size(self) -> int:
        """Ranks of each group."""
        return len(self.members[0])

    def places(self, rank: int, size: int) -> tuple[list[int], list[int]]:
        """The ranks of this rank's group, and those that have the same place in their groups; both ascending.

        Raises:
            ValueError: the channel has another number of ranks.
        """
        if size != self.local_size * len(self.members):
            raise ValueError(
                f"exact_within: {self.members} name {self.local_size * len(self.members)} ranks, but the group has "
                f"{size}"
            )
        (own,) = (group for group in self.members if rank in group)
        return own, sorted(other[own.index(rank)] for other in self.members)


class TwoLevelMean:
    """x_r <- mean over groups g of cast(m_g), m_g = mean of the x_q of g's ranks q, which is exact in fp32.

    The l-th of the L ranks of a group averages the l-th of L slices within the group, then with the l-th ranks of the
    other groups, and hands the mean to its group: 2 (G-1)/G payloads for each element of a slice cross between the G
    groups, 1/L of what every rank would send them in TwoShotMean. All ranks get the same bits.

    Args:
        groups: of ranks.
        wire_dtype: between groups: torch.float32, torch.bfloat16 or torch.float16; within them it is fp32.
    """

    def __init__(self, groups: Groups, wire_dtype: torch.dtype) -> None:
        self.groups = groups
        self.wire_dtype = wire_dtype
        self.inner = TwoShotMean(torch.float32)
        self.outer = TwoShotMean(wire_dtype)

    def __call__(self, channel: Channel, tensor: Tensor) -> None:
        """Replace the flat, contiguous `tensor` by the mean over the ranks. Not reentrant."""
        own, peers = self.groups.places(channel.rank, channel.size)
        within, between = channel.among(own), channel.among(peers)
        exact = tensor.to(torch.float32)  # itself, where it is
        mean = self.inner.reduce(within, exact)
        self.outer(between, mean)
        self.inner.gather(within, exact, mean)
        if exact is not tensor:
            tensor.copy_(exact)

    def sent_bytes(self, numel: int, rank: int, size: int) -> dict[int, int]:
        """Payload bytes that `rank` sends for a tensor of `numel` elements, by receiving rank."""
        inner, outer = self.parts(numel, rank, size)
        return dict.fromkeys((r for r in range(size) if r != rank), 0) | inner | outer

    def parts(self, numel: int, rank: int, size: int) -> tuple[dict[int, int], dict[int, int]]:
        """What sent_bytes() says in two parts: within the group, half of it first and half at the end; between them."""
        own, peers = self.groups.places(rank, size)
        index = own.index(rank)
        inner = self.inner.sent_bytes(numel, index, len(own))
        outer = self.outer.sent_bytes(split_evenly(numel, len(own))[index], peers.index(rank), len(peers))
        return {own[r]: count for r, count in inner.items()}, {peers[r]: count for r, count in outer.items()}

    def scratch_bytes(self, numel: int, rank: int, size: int, *, cast: bool) -> int:
        """What is kept from call to call for tensors of up to `numel` elements; `cast` changes nothing here."""
        own, peers = self.groups.places(rank, size)
        index = own.index(rank)
        slice_numel = split_evenly(numel, len(own))[index]
        is_cast = self.wire_dtype != torch.float32
        return self.inner.scratch_bytes(numel, index, len(own), cast=False) + self.outer.scratch_bytes(
            slice_numel, peers.index(rank), len(peers), cast=is_cast
        )

"""The weights of one unit: owners change their rows, and everybody's shard follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.partition.cascade import Cascade
from thinwire.comm.partition.levels import Levels
from thinwire.comm.partition.ownership import Ownership
from thinwire.comm.partition.placement import Placement


class UpdateWire(Protocol):
    """A format for weights that their owner has changed.

    Attributes: is_exact, whether the payload is the weights themselves, in their dtype: all get what the owner has.
    """

    is_exact: bool

    def payload_bytes(self, numel: int, dtype: torch.dtype) -> int:
        """Bytes that as many weights of a dtype take."""
        ...

    def encode(self, new: Tensor, old: Tensor, *, key: int) -> Tensor:
        """What must be sent so that `old`, flat, of the weights' dtype, becomes `new`, fp32: uint8.

        An exact format looks at the dtype of `old` alone, which may be empty.
        """
        ...

    def apply(self, payload: Tensor, weights: Tensor) -> None:
        """Turn old weights, flat, into the new ones, in place: the same bits on every rank, the owner included."""
        ...


class WeightShard:
    """Spreads a unit's new weights from their owners over the levels between optim and params, slowest first.

    Every rank, the owner too, decodes the same payload: so all copies of a row are equal, bit for bit, whatever the
    format leaves out, and the owner's fp32 master keeps what was left out for the next difference.
    """

    def __init__(self, ownership: Ownership, levels: Levels, placement: Placement, wire: UpdateWire) -> None:
        self._ownership = ownership
        self._wire = wire
        self._cascade = Cascade(levels, placement.params, placement.optim)
        self._owner = levels.number(levels.rank, placement.optim)
        self._first = self._owner - self._cascade.leaf
        self._counts = ownership.counts(self._first, self._first + self._cascade.leaves)

    @property
    def spreads_alone(self) -> bool:
        """Whether this rank's owner is the owner of all rows of its shard."""
        return self._cascade.leaves == 1

    def own_rows(self, shard: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Views of the rows of the shard that this rank owns, by name; empty ones included.

        Args:
            shard: this rank's rows of each parameter.
        """
        found = {}
        for name, tensor in shard.items():
            start, stop = self._ownership.rows(name, self._owner)
            begin = self._ownership.rows(name, self._first)[0]
            found[name] = tensor[start - begin : stop - begin]
        return found

    def spread(self, channel: Channel | None, shard: Mapping[str, Tensor], new: Mapping[str, Tensor], key: int) -> None:
        """Overwrite every row of the shard by what its owner sends.

        Args:
            shard: this rank's rows of each parameter; owners' rows are as they were before the step, or, where the wire
                is exact, may be changed already.
            new: this rank's own rows, fp32.
        """
        own_new = torch.cat([new[name].reshape(-1) for name in self._ownership.shapes])
        own_rows = [rows.reshape(-1) for rows in self.own_rows(shard).values()]
        dtype = own_rows[0].dtype
        # An exact format looks at the dtype alone.
        own_old = own_rows[0][:0] if self._wire.is_exact else torch.cat(own_rows)
        payload = self._wire.encode(own_new, own_old, key=key)
        sizes = self._sizes(dtype)
        if channel is not None:
            payload = self._cascade.all_gather(channel, payload, sizes)
        pieces = self._ownership.pieces(shard, self._first, self._first + self._cascade.leaves)
        if not pieces:
            return
        flat = payload.view(dtype) if self._wire.is_exact else self._applied(payload.split(sizes), pieces)
        torch._foreach_copy_(pieces, list(flat.split([piece.numel() for piece in pieces])))

    def sent_bytes(self, dtype: torch.dtype) -> Counter[str]:
        """Payload bytes that this rank sends in spread(), by level."""
        return Counter(self._cascade.all_gather_bytes(self._sizes(dtype)))

    def _applied(self, payloads: Sequence[Tensor], pieces: Sequence[Tensor]) -> Tensor:
        """The new weights, flat, of the old ones in `pieces` and what each owner has sent."""
        flat = torch.cat(list(pieces))
        bounds = [offset - self._ownership.offsets[self._first] for offset in self._offsets()]
        for part, (start, stop) in zip(payloads, pairwise(bounds), strict=True):
            if start < stop:
                self._wire.apply(part, flat[start:stop])
        return flat

    def _sizes(self, dtype: torch.dtype) -> list[int]:
        return [self._wire.payload_bytes(count, dtype) for count in self._counts]

    def _offsets(self) -> list[int]:
        return self._ownership.offsets[self._first : self._first + self._cascade.leaves + 1]

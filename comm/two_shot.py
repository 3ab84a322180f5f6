"""Mean of a flat tensor over the ranks: all-to-all, one reduction in fp32 in rank order, all-gather."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.kernels.cast_reduce import cast_reduce

# From this size of a slice on, one rank after another may be better; see Pace, which says when.
_ROUNDS_FROM_BYTES = 1 << 14
_ALIGNMENT = 16  # elements


class TwoShotMean:
    """x_r <- cast(1/n * sum_{q=0..n-1} cast(x_q)), the same bits on every rank r.

    Rank r owns the r-th slice. Every rank casts its tensor to the wire's dtype and sends each owner its slice. The
    owner sums the n payloads, its own cast one included, in fp32 and in rank order, multiplies by 1/n, rounds once to
    the wire's dtype, and sends the slice to everyone. Each rank sends 2 (n-1)/n payloads per element, as in a ring, but
    in as few as two network latencies, and the result depends neither on the topology nor on chance.

    Args:
        wire_dtype: torch.float32, torch.bfloat16 or torch.float16.
    """

    def __init__(self, wire_dtype: torch.dtype) -> None:
        self.wire_dtype = wire_dtype
        self._scratch: dict[str, Tensor] = {}

    def __call__(self, channel: Channel, tensor: Tensor) -> None:
        """Replace the flat, contiguous `tensor` by the mean over the ranks. Not reentrant."""
        cast = tensor.dtype != self.wire_dtype
        payload = self._take("payload", tensor.numel(), tensor.device).copy_(tensor) if cast else tensor
        self.gather(channel, payload, self.reduce(channel, payload))
        if cast:
            tensor.copy_(payload)

    def reduce(self, channel: Channel, payload: Tensor) -> Tensor:
        """The first shot: the mean of this rank's slice. Valid until the next call.

        Args:
            payload: flat, contiguous and of the wire's dtype; its slices are those of split_evenly().
        """
        splits = split_evenly(payload.numel(), channel.size)
        own = splits[channel.rank]
        received = self._take("received", channel.size * own, payload.device)
        in_rounds = self._in_rounds(payload, channel)
        channel.all_to_all(received, payload, [own] * channel.size, splits, in_rounds=in_rounds)
        reduced = self._take("reduced", own, payload.device)
        return cast_reduce(received.view(channel.size, own), scale=1.0 / channel.size, out=reduced)

    def gather(self, channel: Channel, out: Tensor, reduced: Tensor) -> None:
        """The second shot: fill `out`, flat and contiguous, with every rank's slice."""
        splits = split_evenly(out.numel(), channel.size)
        channel.all_gather(out, reduced, splits, in_rounds=self._in_rounds(out, channel))

    def sent_bytes(self, numel: int, rank: int, size: int) -> dict[int, int]:
        """Payload bytes that `rank` sends for a tensor of `numel` elements, by receiving rank."""
        splits = split_evenly(numel, size)
        return {r: (splits[r] + splits[rank]) * self.wire_dtype.itemsize for r in range(size) if r != rank}

    def scratch_bytes(self, numel: int, rank: int, size: int, *, cast: bool) -> int:
        """What is kept from call to call for tensors of up to `numel` elements.

        Args:
            cast: whether they come in another dtype than the wire's.
        """
        own = split_evenly(numel, size)[rank]
        return (size * own + own + cast * numel) * self.wire_dtype.itemsize

    def _in_rounds(self, payload: Tensor, channel: Channel) -> bool:
        return is_worth_rounds(payload.numel() // channel.size * self.wire_dtype.itemsize)

    def _take(self, use: str, numel: int, device: torch.device) -> Tensor:
        """Scratch for one use, kept between calls: fresh pages would cost more than the reduction."""
        held = self._scratch.get(use)
        if held is None or held.numel() < numel or held.device != device:
            held = self._scratch[use] = torch.empty(numel, dtype=self.wire_dtype, device=device)
        return held[:numel]


def split_evenly(numel: int, size: int, unit: int = _ALIGNMENT) -> list[int]:
    """Elements per rank: as equal as can be in steps of `unit`: 16 lets a GPU read every slice 16 bytes at a time."""
    blocks, rest = divmod(numel, unit)
    sizes = [unit * (blocks // size + (r < blocks % size)) for r in range(size)]
    sizes[blocks % size] += rest
    return sizes


def is_worth_rounds(slice_bytes: int) -> bool:
    """Whether slices of this size fill a link better when they are exchanged with one rank after another."""
    return slice_bytes >= _ROUNDS_FROM_BYTES

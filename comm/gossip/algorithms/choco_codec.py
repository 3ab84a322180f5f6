"""What CHOCO sends: compressed differences to a public copy that sender and receivers keep alike."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.planes import join, need_bytes, need_finite, plane
from thinwire.comm.compress.decoded import add_to
from thinwire.comm.compress.draw import Draw
from thinwire.comm.wire import PayloadError

_DIFFERENCE, _WHOLE = 0, 1
_HEAD_BYTES = 4
_TAGS = 0xFFFFFF


@dataclass(frozen=True, eq=False)
class _Copy:
    """A public copy. tag: of the vector that it began from; differences of another tag belong to another copy."""

    tag: int
    value: Tensor


class ChocoCodec:
    """Codec with memory: q = C(x_i - xhat_i) travels, and xhat_i += q at its sender and at all who receive it.

    Every copy begins from a vector that all machines have: zeros, the weights that all start with, or those of a merge.
    Where a receiver has not the sender's (a tag in each payload tells), or a machine enters late, x_i itself is sent
    once, in fp32, and the copy begins from that.

    Payload: u8 form (0 a difference, 1 x itself), u24 tag, little-endian; then C's payload, or the elements in fp32.

    Args:
        compressor: C; it sees all weights as one flat tensor.
        rank: of this machine.
        seed: of what C draws at random.
        start: what all copies begin from, the same on all machines.
    Attributes: before, ||x - xhat||^2 of the last encode() before q was added; residual, x - xhat after it.
    """

    remembers = True

    def __init__(self, compressor: Compressor, *, rank: int, seed: int, start: Tensor) -> None:
        self._compressor = compressor
        self._rank = rank
        self._seed = seed
        self.before = 0.0
        self.residual = torch.zeros_like(start)
        self._entered = False
        self._give_whole = False
        self.begin_from(start)

    def begin_from(self, start: Tensor) -> None:
        """All machines that hold these very bits begin their copies from them."""
        self._start: _Copy | None = _Copy(_tag_of(start), start.clone())
        self._own = self._start
        self._own_since = -1  # the round before the first of which the present copy is
        self._others: dict[int, _Copy] = {}

    def encode(self, round: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """As Codec says."""
        if not self._entered and round > 0:
            # A machine that enters a run under way: nobody has its copy, and it has nobody's.
            self._give_whole, self._start = True, None
        self._entered = True
        assert self._own is not None
        residual = (value - self._own.value).to(torch.float32)
        self.before = float(residual.square().sum(dtype=torch.float64))
        if self._give_whole:
            body = join(value.to(torch.float32))
            self._own = _Copy(zlib.crc32(body.cpu().numpy().data) & _TAGS, self._whole(body, value))
            self._own_since, self._give_whole = round, False
            form = _WHOLE
        else:
            body = self._compressor.encode(residual, self._draw(round, self._rank))
            self._own = self._advanced(self._own, body, round, self._rank)
            form = _DIFFERENCE
        self.residual = value - self._own.value
        head = torch.tensor([form, *self._own.tag.to_bytes(3, "little")], dtype=torch.uint8)
        return join(head, body.cpu()), self._own.value

    def decode(self, source: int, round: int, payload: Tensor, like: Tensor) -> Tensor:
        """As Codec says. What is a difference to what this machine lacks changes nothing, and knows() says so."""
        head = plane(payload, 0, _HEAD_BYTES, torch.uint8).tolist()
        form, tag = head[0], int.from_bytes(bytes(head[1:]), "little")
        body = payload[_HEAD_BYTES:].to(like.device)
        if form == _WHOLE:
            need_bytes(body, 4 * like.numel(), "choco")
            self._others[source] = _Copy(tag, self._whole(body, like))
        elif form == _DIFFERENCE:
            known = self._others.get(source, self._start)
            if known is None or known.tag != tag:
                known = _Copy(-1, torch.zeros_like(like))  # of no tag: never taken for what it is not
            self._others[source] = self._advanced(known, body, round, source)
        else:
            raise PayloadError(f"choco: a payload of form {form}; there are 0 and 1")
        return self._others[source].value

    def knows(self, source: int) -> bool:
        """As Remembering says."""
        known = self._others.get(source, self._start)
        return known is not None and known.tag >= 0

    def is_lacked(self, round: int) -> None:
        """As Remembering says."""
        self._give_whole = self._give_whole or self._own_since < round - 1

    def payload_bytes(self, numel: int, itemsize: int) -> int | None:
        """As Codec says, but for the rare payloads of x itself."""
        return self.expected_bytes(numel, itemsize) if self._compressor.fixed_size else None

    def expected_bytes(self, numel: int, itemsize: int) -> int:
        """Of a payload, also where the data decide its length."""
        return _HEAD_BYTES + self._compressor.payload_bytes(torch.Size((numel,)))

    def state_dict(self) -> dict[str, Any]:
        """All copies: this machine's and its neighbours'."""
        return {
            "entered": self._entered,
            "give_whole": self._give_whole,
            "own_since": self._own_since,
            "own": _packed(self._own),
            "start": _packed(self._start),
            "others": {str(rank): _packed(copy) for rank, copy in self._others.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave."""
        like = self._own.value
        self._entered = bool(state["entered"])
        self._give_whole = bool(state["give_whole"])
        self._own_since = int(state["own_since"])
        own = _unpacked(state["own"], like)
        assert own is not None
        self._own = own
        self._start = _unpacked(state["start"], like)
        others = {int(rank): _unpacked(copy, like) for rank, copy in state["others"].items()}
        self._others = {rank: copy for rank, copy in others.items() if copy is not None}

    def _advanced(self, copy: _Copy, body: Tensor, round: int, source: int) -> _Copy:
        """copy + C's decoding. A new tensor: the old one may still be part of a round."""
        decoded = self._compressor.decode(body, torch.Size((copy.value.numel(),)), self._draw(round, source))
        value = copy.value.clone()
        add_to(value, decoded)
        return _Copy(copy.tag, need_finite(value, "choco"))

    def _whole(self, body: Tensor, like: Tensor) -> Tensor:
        return need_finite(plane(body, 0, like.numel(), torch.float32).to(like.dtype, copy=True), "choco")

    def _draw(self, round: int, source: int) -> Draw:
        return Draw(self._seed, round, "gossip", source)


def _tag_of(start: Tensor) -> int:
    return zlib.crc32(start.cpu().contiguous().numpy().data) & _TAGS


def _packed(copy: _Copy | None) -> dict[str, Any]:
    return {} if copy is None else {"tag": copy.tag, "value": copy.value}


def _unpacked(state: Mapping[str, Any], like: Tensor) -> _Copy | None:
    return _Copy(int(state["tag"]), state["value"].to(like)) if state else None

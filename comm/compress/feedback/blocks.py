"""A double-buffered store in 8 bits: blocks of 256 values with one scale, rounded without bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from thinwire.comm.compress.feedback.store import Buffered, check_range, norm, weighted_sums
from thinwire.kernels.block_quantize import dequantize, quantize

_BLOCK = 256
_Blocks: TypeAlias = tuple[Tensor, Tensor]  # codes, scales


class BlockPair(Buffered):
    """Two sets of codes that change places at commit(): 2 * (1 + 4/256) bytes per element, fp32 only in use.

    A value is stored as scale * code with |code| <= 127 and scale = max |value| / 127 of its block, the code rounded up
    or down at random so that its mean is exact: small leftovers survive on average, where rounding to nearest, or a
    16-bit format, would drop them for good.

    Args:
        key: the random key for a name in the present step.
    """

    storage = "int8"

    def __init__(self, key: Callable[[str], int]) -> None:
        self._key = key
        self._now: dict[str, _Blocks] = {}
        self._spare: dict[str, _Blocks] = {}
        self._next: dict[str, Tensor] = {}
        self._sealed: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._now

    def now(self, name: str, like: Tensor) -> Tensor:
        if name not in self._now:
            return torch.zeros_like(like)
        codes, _ = self._now[name]
        if codes.numel() != like.numel():
            raise ValueError(
                f"feedback: the memory of {name} has {codes.numel()} elements, but its gradient {like.numel()}; it was "
                "loaded for another model, or two parameters share the name"
            )
        return _decode(self._now[name]).view(like.shape)

    def next(self, name: str, like: Tensor) -> Tensor:
        if name not in self._next:
            self._next[name] = torch.empty_like(like)
        return self._next[name]

    def seal(self, name: str) -> None:
        self._spare[name] = self._encode(self._next.pop(name), name, self._spare.get(name))
        self._sealed.add(name)

    def commit(self) -> None:
        for name in self._sealed:
            complete = self._spare.pop(name)
            if name in self._now:
                self._spare[name] = self._now[name]
            self._now[name] = complete
        self.rollback()

    def rollback(self) -> None:
        self._sealed.clear()
        self._next.clear()

    def add(self, name: str, offset: int, values: Tensor) -> None:
        total = _decode(self._now[name])
        check_range(name, offset, values, total.numel())
        total[offset : offset + values.numel()] += values.view(-1)
        self._now[name] = self._encode(total, name, None)

    def state(self) -> dict[str, Any]:
        return {name: {"codes": codes.clone(), "scales": scales.clone()} for name, (codes, scales) in self._now.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.rollback()
        self._now = {name: (blocks["codes"].clone(), blocks["scales"].clone()) for name, blocks in state.items()}

    def average(self, states: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
        decoded = [{n: _decode((b["codes"], b["scales"])) for n, b in state.items()} for state in states]
        sums = weighted_sums(decoded, weights)
        blocks = {name: self._encode(total, name, None) for name, total in sums.items()}
        return {name: {"codes": codes, "scales": scales} for name, (codes, scales) in blocks.items()}

    def kept_bytes(self, numel: int) -> int:
        return 2 * (numel + 4 * -(-numel // _BLOCK))

    def norm(self) -> float:
        return norm(_decode(blocks) for blocks in self._now.values())

    def _encode(self, value: Tensor, name: str, into: _Blocks | None) -> _Blocks:
        codes, scales = into or (None, None)
        return quantize(
            value.view(-1),
            bits=8,
            block=_BLOCK,
            rounding="stochastic",
            key=self._key(name),
            codes=codes,
            scales=scales,
        )


def _decode(blocks: _Blocks) -> Tensor:
    codes, scales = blocks
    return dequantize(codes, scales, bits=8, block=_BLOCK, numel=codes.numel())

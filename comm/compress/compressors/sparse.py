"""What compressors share that send some entries of a tensor: the payload of indices and values, and its feedback."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.block_contraction import block_contraction
from thinwire.comm.compress.compressors.planes import join, need_bytes, need_finite, plane
from thinwire.comm.compress.decoded import Sparse
from thinwire.comm.compress.draw import Draw
from thinwire.comm.compress.index_code import decode_indices, encode_indices
from thinwire.comm.compress.value_code import BLOCK, ValueKind, decode_values, encode_values, values_bytes
from thinwire.comm.wire import PayloadError

_DENSE = 0xFFFFFFFF


class SparseCompressor(Compressor):
    """C(x)_i = x_i, rounded as `values` says, at the places that keep() chooses, and 0 elsewhere.

    Payload: u32 count, the values, the indices. Where that would be longer than the tensor itself, the count is
    0xFFFFFFFF and all elements follow as fp32.

    Attributes:
        values: how the kept values are written; see value_code. So few that fp32 is no longer are fp32.
    """

    fixed_size: ClassVar[bool] = False
    sparse: ClassVar[bool] = True

    values: ValueKind = "fp32"

    @abstractmethod
    def keep(self, flat: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Indices, int64 and ascending, and values of the entries to send; no zeros."""

    def keep_with_feedback(
        self, gradient: Tensor, memory: Tensor, next_memory: Tensor, draw: Draw
    ) -> tuple[Tensor, Tensor]:
        """keep(gradient + memory), and next_memory <- gradient + memory, with zeros at the entries kept; all flat."""
        torch.add(gradient, memory, out=next_memory)
        indices, values = self.keep(next_memory, draw)
        next_memory[indices] = 0.0
        return indices, values

    @abstractmethod
    def expected_count(self, numel: int) -> int:
        """How many entries of a tensor of `numel` elements, none of them zero, are about to be kept."""

    def payload_bytes(self, shape: torch.Size) -> int:
        numel = shape.numel()
        count = self.expected_count(numel)
        indices = math.ceil(count * index_bits(count / numel) / 8)
        return min(4 + values_bytes(count, written_as(self.values, count)) + indices, 4 + 4 * numel)

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        flat = tensor.view(-1)
        indices, values = self.keep(flat, draw)
        payload = self._pack(indices, values, flat.numel(), draw)
        return _pack_dense(flat) if payload is None else payload

    def encode_with_feedback(self, gradient: Tensor, memory: Tensor, next_memory: Tensor, draw: Draw) -> Tensor:
        flat = next_memory.view(-1)
        indices, values = self.keep_with_feedback(gradient.view(-1), memory.view(-1), flat, draw)
        payload = self._pack(indices, values, flat.numel(), draw)
        if payload is None:
            flat[indices] = values
            payload = _pack_dense(flat)
            flat.masked_fill_(flat != 0, 0.0)  # what was left behind of -0.0 is -0.0
        elif (kind := written_as(self.values, len(values))) != "fp32":
            sent, _ = decode_values(payload[4:], len(values), kind)
            flat[indices] = values - sent
        return payload

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Sparse:
        name = type(self).__name__
        numel = shape.numel()
        count = int(plane(payload, 0, 4, torch.uint8).cpu().numpy().view("<u4")[0])
        if count == _DENSE:
            need_bytes(payload, 4 + 4 * numel, name)
            flat = need_finite(plane(payload, 4, numel, torch.float32), name)
            indices = flat.nonzero().view(-1)
            return Sparse(numel, indices, flat[indices])
        if count > numel:
            raise PayloadError(f"{name}: {count} entries of a tensor of {numel}")
        values, values_end = decode_values(payload[4:], count, written_as(self.values, count))
        need_finite(values, name)
        indices, indices_end = decode_indices(payload[4 + values_end :], numel, count)
        need_bytes(payload, 4 + values_end + indices_end, name)
        return Sparse(numel, indices, values)

    def _pack(self, indices: Tensor, values: Tensor, numel: int, draw: Draw) -> Tensor | None:
        """The payload; None if it would be longer than the dense one."""
        count = len(indices)
        if count >= _DENSE:
            return None
        head = torch.tensor([count & 0xFF, count >> 8 & 0xFF, count >> 16 & 0xFF, count >> 24], dtype=torch.uint8)
        coded = encode_values(values, written_as(self.values, count), draw.own_key())
        payload = join(head.to(values.device), coded, encode_indices(indices, numel))
        return None if payload.numel() > 4 + 4 * numel else payload


def kept_count(density: float | None, k: int | None, numel: int) -> int:
    """How many of numel entries a density or a count asks for: at least 1, at most all."""
    wanted = round(density * numel) if density is not None else k
    assert wanted is not None
    return min(max(wanted, 1), numel)


def written_as(kind: ValueKind, count: int) -> ValueKind:
    """fp32 for so few values that their scales or codebook would cost more than they save."""
    return kind if values_bytes(count, kind) < 4 * count else "fp32"


def values_contraction(kind: ValueKind, count: int) -> float | None:
    """alpha of the rounding of `count` values; None where none is guaranteed."""
    if kind.startswith("int"):
        levels = 127 if kind.startswith("int8") else 7
        return block_contraction(min(count, BLOCK), levels, stochastic=kind.endswith("_stochastic"))
    return {"fp32": 1.0, "bf16": 1 - 2.0**-16, "sign": 1 / count}.get(kind)


def _pack_dense(flat: Tensor) -> Tensor:
    return join(torch.full((4,), 0xFF, dtype=torch.uint8, device=flat.device), flat)


def index_bits(density: float) -> float:
    """Bits for each kept index of a random set: the entropy of a coin of this bias, over the density."""
    rest = 1.0 - density
    return -math.log2(density) - (rest * math.log2(rest) / density if rest > 0 else 0.0)


def with_default_density(given: Any) -> Any:
    """Settings as given, with density = 0.01 where they name neither density nor k."""
    if isinstance(given, dict) and given.get("density") is None and given.get("k") is None:
        return {**given, "density": 0.01}
    return given


def refuse_two_sizes(kind: str, density: float | None, k: int | None) -> None:
    """Raises ValueError where both say how many entries to keep."""
    if density is not None and k is not None:
        raise ValueError(f"{kind}: density is {density} and k is {k}; give one of them")

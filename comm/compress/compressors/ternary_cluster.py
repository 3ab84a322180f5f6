"""`ternary_cluster`: the largest entries, each as one of two cluster centres."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.planes import join, need_bytes, need_finite, need_zero_tail, plane
from thinwire.comm.compress.compressors.sparse import index_bits, kept_count
from thinwire.comm.compress.decoded import Sparse
from thinwire.comm.compress.draw import Draw
from thinwire.comm.compress.index_code import decode_indices, encode_indices
from thinwire.comm.wire import PayloadError
from thinwire.kernels.bit_pack import WIDEST, pack_bits, packed_bytes, unpack_bits
from thinwire.kernels.threshold_select import top_k

_DENSE, _HUFFMAN, _POSITIONS, _GAPS = range(4)
_HEAD_BYTES = 16
_ROUNDS = 20  # of Lloyd's algorithm, which seldom needs more than five in one dimension
_MAX_NUMEL = 1 << 32


class TernaryCluster(Compressor):
    """C(x)_i = the one of three centres that is nearest to x_i: one negative, zero, one positive.

    FedZip: Malekijoo, Fadaeieslam, Malekijou, Homayounfar, Alizadeh-Shabdiz, Rawassizadeh (2021), arXiv 2102.01593. All
    but the density * numel entries of largest magnitude become zero; k-means with three centres on what is left; and of
    three encodings the shortest. Where we differ: the middle centre stays at zero, so that what was dropped stays
    dropped; k-means begins with the means of the two signs, and so always gives the same; and the gaps between kept
    places have the adaptive code of all our sparse payloads in place of Huffman's, which would have to send its table.

    Payload: u8 form; as it is: 3 zero bytes, fp32 elements. Otherwise u8 common, 2 zero bytes, u32 kept, fp32 negative
    centre, fp32 positive centre, then
        Huffman    one bit an element, 1 if it is not the common symbol (0 zero, 1 negative, 2 positive), one bit more
                   for each of these, which of the two others in ascending order: the Huffman code of three symbols,
                   its first and second bits in planes of their own
        positions  a bit for each kept entry, 1 if positive, and its index in as many bits as numel - 1 has, 25 at most
        gaps       the same bits, and the indices in index_code

    Attributes:
        density: kept / all, at most: an entry that k-means finds nearer to zero is not sent.
    """

    fixed_size: ClassVar[bool] = False
    sparse: ClassVar[bool] = True

    kind: Literal["ternary_cluster"] = "ternary_cluster"
    density: float = Field(default=0.01, gt=0, le=1)

    def payload_bytes(self, shape: torch.Size) -> int:
        numel = shape.numel()
        count = kept_count(self.density, None, numel)
        bits = count * (1 + index_bits(count / numel))
        return min(_HEAD_BYTES + -int(-bits // 8), 4 + 4 * numel)

    def encode(self, tensor: Tensor, draw: Draw) -> Tensor:
        flat = tensor.view(-1)
        numel = flat.numel()
        assert numel <= _MAX_NUMEL, f"a tensor of {numel} elements"
        indices, values = top_k(flat, kept_count(self.density, None, numel))
        negative, positive, kept = _centres(values)
        indices, is_positive = indices[kept], values[kept] > 0
        plus = int(is_positive.sum())
        common, huffman_bytes = _plan_huffman(numel - len(indices), len(indices) - plus, plus)
        signs, gaps = pack_bits(is_positive, 1), encode_indices(indices, numel)
        width = _width(numel)
        sizes = {_HUFFMAN: huffman_bytes, _GAPS: len(signs) + len(gaps)}
        if width <= WIDEST:
            sizes[_POSITIONS] = len(signs) + packed_bytes(len(indices), width)
        form = min(sizes, key=lambda form: (sizes[form], form))
        if form == _HUFFMAN:
            parts = _write_huffman(indices, is_positive, numel, common)
        else:
            common, parts = 0, (signs, gaps if form == _GAPS else pack_bits(indices, width))
        head = torch.tensor([form, common, 0, 0], dtype=torch.uint8)
        count = torch.from_numpy(np.array([len(indices)], dtype="<u4").view(np.uint8))
        centres = torch.tensor([negative, positive], dtype=torch.float32)
        head = join(head, count, centres).to(tensor.device)
        payload = join(head, *parts)
        if len(payload) <= 4 + 4 * numel:
            return payload
        return join(torch.tensor([_DENSE, 0, 0, 0], dtype=torch.uint8, device=tensor.device), flat)

    def decode(self, payload: Tensor, shape: torch.Size, draw: Draw) -> Sparse:
        name = type(self).__name__
        numel = shape.numel()
        form, common, *rest = plane(payload, 0, 4, torch.uint8).tolist()
        if form > _GAPS or common > 2 or any(rest) or (common and form != _HUFFMAN):
            raise PayloadError(f"{name}: a payload that begins with {form}, {common}, {rest}")
        if form == _DENSE:
            need_bytes(payload, 4 + 4 * numel, name)
            flat = need_finite(plane(payload, 4, numel, torch.float32), name)
            indices = flat.nonzero().view(-1)
            return Sparse(numel, indices, flat[indices])
        count = int(plane(payload, 4, 4, torch.uint8).cpu().numpy().view("<u4")[0])
        centres = need_finite(plane(payload, 8, 2, torch.float32), name)
        negative, positive = centres.tolist()
        if count > numel or negative > 0 or positive < 0:
            raise PayloadError(f"{name}: {count} of {numel} entries, at {negative} and {positive}")
        body = payload[_HEAD_BYTES:]
        if form == _HUFFMAN:
            indices, is_positive = _read_huffman(body, numel, common)
            if len(indices) != count:
                raise PayloadError(f"{name}: {len(indices)} entries where {count} were announced")
        else:
            is_positive = _read_bits(body, 0, count)
            start = -(-count // 8)
            if form == _GAPS:
                indices, used = decode_indices(body[start:], numel, count)
                need_bytes(body, start + used, name)
            else:
                indices = _read_positions(body[start:], numel, count)
        return Sparse(numel, indices, torch.where(is_positive, centres[1], centres[0]))


def _centres(values: Tensor) -> tuple[float, float, Tensor]:
    """Lloyd's algorithm in one dimension with a third centre at 0: the two others, and which values are theirs."""
    exact = values.double()
    plus, minus = exact > 0, exact < 0
    while True:
        positive, negative = _mean(exact[plus]), _mean(exact[minus])
        # The centres move outwards only, so that what has gone to zero stays there and this ends.
        next_plus, next_minus = plus & (exact > positive / 2), minus & (exact < negative / 2)
        if torch.equal(next_plus, plus) and torch.equal(next_minus, minus):
            return negative, positive, plus | minus
        plus, minus = next_plus, next_minus


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0


def _width(numel: int) -> int:
    return max((numel - 1).bit_length(), 1)


def _plan_huffman(*counts: int) -> tuple[int, int]:
    """The symbol that has one bit while the others have two, and the bytes of both planes."""
    common = max(range(3), key=lambda symbol: (counts[symbol], -symbol))
    return common, packed_bytes(sum(counts), 1) + packed_bytes(sum(counts) - counts[common], 1)


def _write_huffman(indices: Tensor, is_positive: Tensor, numel: int, common: int) -> tuple[Tensor, Tensor]:
    symbols = torch.zeros(numel, dtype=torch.uint8, device=indices.device)
    symbols[indices] = is_positive.to(torch.uint8) + 1
    others = symbols[symbols != common]
    return pack_bits(symbols != common, 1), pack_bits(others == _others(common)[1], 1)


def _read_huffman(body: Tensor, numel: int, common: int) -> tuple[Tensor, Tensor]:
    uncommon = _read_bits(body, 0, numel)
    start = -(-numel // 8)
    count = int(uncommon.sum())
    second = _read_bits(body, start, count)
    need_bytes(body, start + -(-count // 8), "TernaryCluster")
    symbols = torch.full((numel,), common, dtype=torch.uint8, device=body.device)
    first_other, second_other = _others(common)
    symbols[uncommon] = torch.where(second, second_other, first_other).to(torch.uint8)
    indices = symbols.nonzero().view(-1)
    return indices, symbols[indices] == 2


def _others(symbol: int) -> tuple[int, int]:
    return (1, 2) if symbol == 0 else (0, 2) if symbol == 1 else (0, 1)


def _read_positions(part: Tensor, numel: int, count: int) -> Tensor:
    width = _width(numel)
    if width > WIDEST:
        raise PayloadError(f"TernaryCluster: positions among {numel}, which are never written")
    need_bytes(part, -(-count * width // 8), "TernaryCluster")
    if used := count * width % 8:
        need_zero_tail(part[-1], used, "TernaryCluster")
    indices = unpack_bits(part, width, count).to(torch.int64)
    if count and (int(indices[-1]) >= numel or bool((indices[1:] <= indices[:-1]).any())):
        raise PayloadError(f"TernaryCluster: positions that do not ascend, or are not below {numel}")
    return indices


def _read_bits(body: Tensor, start: int, count: int) -> Tensor:
    """`count` bits from byte `start` on, as bool."""
    part = plane(body, start, -(-count // 8), torch.uint8)
    if used := count % 8:
        need_zero_tail(part[-1], used, "TernaryCluster")
    return unpack_bits(part, 1, count).to(torch.bool)

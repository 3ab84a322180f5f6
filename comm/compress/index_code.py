"""The code of a set of places: ascending indices in close to as few bits as there are sets to tell apart.

k of N places cost log2 C(N, k) bits at least, about log2(N/k) + 1.44 each. Wherever the set comes from, be it k of
each chunk of 4096 or the largest of a whole bucket, it is coded as one ascending list: gaps do not see the borders of
chunks, and parameters are shared by as many gaps as is best, not by those of a chunk.

A payload is a byte that names its form, and the smallest of four forms, all little-endian and LSB first:

    RAW          each index in as many bytes as numel - 1 needs
    BITMAP       a bit for each place
    ELIAS_FANO   u8 b, size, low b bits of each index, unary differences of the rest (Elias 1974, Fano 1971)
    RICE         see rice_code.py; but for its table never longer than ELIAS_FANO

No index at all, or all of them, take no byte: the count says it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from thinwire.comm.compress.bit_stream import (
    Ints,
    Reader,
    bytes_of_bits,
    in_blocks,
    low_bits_bytes,
    pack_low_bits,
    pack_unary,
    unpack_low_bits,
    unpack_unary,
    write_size,
)
from thinwire.comm.compress.rice_code import RiceCode, read_rice
from thinwire.comm.wire import PayloadError

RAW, BITMAP, ELIAS_FANO, RICE = range(4)
_MAX_NUMEL = 1 << 62


def encode_indices(indices: Tensor, numel: int) -> Tensor:
    """Encode strictly ascending indices of places among `numel`.

    Args: indices, int64 (k,), each in 0..numel-1; numel, at most 2^62.
    Returns: uint8 (payload_bytes,), on the device of the indices; at most numel / 8 + 2 bytes.
    """
    count = indices.numel()
    assert 0 <= count <= numel <= _MAX_NUMEL, f"{count} indices among {numel}"
    if count in {0, numel}:
        return torch.empty(0, dtype=torch.uint8, device=indices.device)
    places = indices.cpu().numpy()
    rice = RiceCode(places)
    low = _elias_fano_width(numel, count)
    unary_bytes = bytes_of_bits(count + (int(places[-1]) >> low))
    low_bytes = low_bits_bytes(np.array([low]), count, _one_block(count))
    sizes = {
        RAW: count * _index_bytes(numel),
        BITMAP: bytes_of_bits(numel),
        ELIAS_FANO: 1 + write_size(unary_bytes).size + low_bytes + unary_bytes,
        RICE: rice.size,
    }
    form = min(sizes, key=lambda form: sizes[form])
    if form == RAW:
        parts = [places.astype("<i8").view(np.uint8).reshape(-1, 8)[:, : _index_bytes(numel)].reshape(-1)]
    elif form == BITMAP:
        present = np.zeros(numel, dtype=np.uint8)
        present[places] = 1
        parts = [np.packbits(present, bitorder="little")]
    elif form == ELIAS_FANO:
        unary = pack_unary(np.diff(places >> low, prepend=0))
        parts = [np.array([low], np.uint8), write_size(unary.size)]
        parts += [*pack_low_bits(in_blocks(places, _one_block(count)), np.array([low]), count), unary]
    else:
        parts = rice.write()
    payload = np.concatenate([np.array([form], np.uint8), *parts])
    assert payload.size == 1 + sizes[form], f"form {form}: {payload.size} bytes, not {1 + sizes[form]}"
    return torch.from_numpy(payload).to(indices.device)


def decode_indices(payload: Tensor, numel: int, count: int) -> tuple[Tensor, int]:
    """The indices at the beginning of `payload`, and how many bytes they take there. Safe with hostile bytes.

    Nothing is allocated for more indices, or places of a bitmap, than there are bits in the payload; only the numbers
    0..numel-1 that count = numel stands for are as many as the caller says.

    Args: payload, uint8, contiguous, maybe longer than the code; numel and count, as the encoder had them.
    Returns: indices, int64 (count,), strictly ascending, each in 0..numel-1, on the payload's device; bytes used.
    Raises:
        PayloadError: these are not `count` indices among `numel`.
    """
    if not 0 <= count <= numel <= _MAX_NUMEL:
        raise PayloadError(f"{count} indices among {numel}")
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=payload.device), 0
    if count == numel:
        return torch.arange(numel, device=payload.device), 0
    reader = Reader(payload.cpu().numpy())
    form = int(reader.take(1)[0])
    if form == RAW:
        places = _read_raw(reader, numel, count)
    elif form == BITMAP:
        places = np.flatnonzero(np.unpackbits(reader.take(bytes_of_bits(numel)), count=numel, bitorder="little"))
        if places.size != count:
            raise PayloadError(f"a bitmap of {places.size} indices where {count} were announced")
    elif form == ELIAS_FANO:
        places = _read_elias_fano(reader, numel, count)
    elif form == RICE:
        places = read_rice(reader, numel, count)
    else:
        raise PayloadError(f"indices in form {form}; there are forms {RAW} to {RICE}")
    if places[0] < 0 or places[-1] >= numel or not (places[1:] > places[:-1]).all():
        raise PayloadError(f"indices that do not ascend, or are not below {numel}")
    return torch.from_numpy(places).to(payload.device), reader.used


def _read_raw(reader: Reader, numel: int, count: int) -> Ints:
    width = _index_bytes(numel)
    stored = reader.take(count * width).reshape(count, width)
    padded = np.zeros((count, 8), dtype=np.uint8)
    padded[:, :width] = stored
    return padded.view("<i8").reshape(-1).astype(np.int64, copy=False)


def _read_elias_fano(reader: Reader, numel: int, count: int) -> Ints:
    low = int(reader.take(1)[0])
    size = reader.take_size()
    if low != _elias_fano_width(numel, count) or count > 8 * size:
        raise PayloadError(f"{count} indices among {numel} with {low} low bits and {size} bytes for the rest")
    places = unpack_low_bits(reader, np.array([low]), count, _one_block(count))
    high = np.cumsum(unpack_unary(reader.take(size), count))
    if high[-1] > (numel - 1) >> low:
        raise PayloadError(f"an index that is not below {numel}")
    places |= high << low
    return places


def _index_bytes(numel: int) -> int:
    return bytes_of_bits((numel - 1).bit_length())


def _elias_fano_width(numel: int, count: int) -> int:
    return (numel // count).bit_length() - 1


def _one_block(count: int) -> int:
    return -(-count // 8) * 8

"""A run of values as bytes: fp32 scales, then codes of 8 or 4 bits, each plane padded to 16 bytes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from thinwire.kernels.code_planes import check_block, codes_bytes, scales_count
from thinwire.kernels.hadamard import ORDER

TILE_COLUMNS = 7
_ALIGNED = 16  # bytes: what a GPU loads and stores at once


@dataclass(frozen=True)
class BlockFormat:
    """What the bytes of a run mean: value i is code_i times the scale of its block, as block_quantize defines them.

    bits: of a code, 8 or 4. block: values with a common scale, a multiple of 32. smooth: the values are transformed by
    hadamard before they are quantised, with zeros behind the last; 1/32 of the transform brings them back.

    Raises: ValueError for other bits or blocks.
    """

    bits: int
    block: int
    smooth: bool = False

    def __post_init__(self) -> None:
        check_block("BlockFormat", self.bits, self.block, (8, 4))
        if self.block % ORDER:
            raise ValueError(f"BlockFormat: block is {self.block}; it must be a multiple of {ORDER}")

    def scales_bytes(self, numel: int) -> int:
        """Bytes from the start of a run to its codes."""
        return _round_up(4 * scales_count(numel, self.block), _ALIGNED)

    def payload_bytes(self, numel: int) -> int:
        """Bytes of a run: a multiple of 16."""
        return self.scales_bytes(numel) + _round_up(codes_bytes(self.coded(numel), self.bits), _ALIGNED)

    def coded(self, numel: int) -> int:
        """How many codes a run has that count: the transform makes more of an unfinished 32."""
        return _round_up(numel, ORDER) if self.smooth else numel

    def planes(self, payload: Tensor, numel: int) -> tuple[Tensor, Tensor]:
        """Views of codes, uint8 (..., bytes of coded()), and scales, fp32, of runs of equal length.

        Args:
            payload: uint8 (..., payload_bytes(numel)).
        """
        assert payload.shape[-1] == self.payload_bytes(numel), (payload.shape, numel, self)
        begin = self.scales_bytes(numel)
        scales = payload[..., :begin].view(torch.float32)[..., : scales_count(numel, self.block)]
        return payload[..., begin : begin + codes_bytes(self.coded(numel), self.bits)], scales


class Runs:
    """Which values of a source make which runs, one run after another.

    Args:
        counts: values in each run.
        segments: (offset in the source, length) of the stretches that are read one after another, together as long as
            the runs; None = the source as it is. A run may begin and end anywhere in a segment.
    Attributes: numel, of all runs; starts, the place of each run's first value; source_numel, the least that a source
    must have; is_plain, whether the runs are the source as it is.

    Raises: ValueError if the runs and the segments are not equally long.
    """

    def __init__(self, counts: Sequence[int], segments: Sequence[tuple[int, int]] | None = None) -> None:
        self.counts = tuple(counts)
        self.numel = sum(self.counts)
        self.starts = tuple(accumulate(self.counts[:-1], initial=0))
        self._sources: list[int] = []
        self._begins = [0]
        for source, length in [(0, self.numel)] if segments is None else segments:
            if self._sources and self._sources[-1] + self._begins[-1] - self._begins[-2] == source:
                self._begins[-1] += length
            elif length:
                self._sources.append(source)
                self._begins.append(self._begins[-1] + length)
        if self._begins[-1] != self.numel:
            raise ValueError(
                f"Runs: the segments hold {self._begins[-1]} values and the runs {self.numel}; give each value once"
            )
        self.is_plain = self._sources in ([], [0])
        lengths = [stop - start for start, stop in pairwise(self._begins)]
        self.source_numel = max(map(sum, zip(self._sources, lengths, strict=True)), default=0)
        self._tables: dict[object, tuple[Tensor, Tensor]] = {}

    def payload_bytes(self, form: BlockFormat) -> int:
        """Bytes of all runs."""
        return sum(form.payload_bytes(count) for count in self.counts)

    def payloads(self, payload: Tensor, form: BlockFormat) -> Iterator[tuple[int, int, Tensor]]:
        """First value, number of values and bytes of each run: views."""
        parts = payload.split([form.payload_bytes(count) for count in self.counts])
        return zip(self.starts, self.counts, parts, strict=True)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Where the values start, ..., stop - 1 are: offset in the source, place, how many."""
        index = bisect_right(self._begins, start) - 1
        while start < stop:
            end = min(self._begins[index + 1], stop)
            yield self._sources[index] + start - self._begins[index], start, end - start
            start, index = end, index + 1

    def tables(self, form: BlockFormat, tile: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """What a kernel must know of each program's tile, and of each segment; made once.

        Returns: int64 (programs, TILE_COLUMNS), where a tile has its place, the number of values from there to the end
            of its run, where its codes are in bytes and its scales in fp32, its offset in the source if the whole tile
            is one stretch at 16 values or else -1, and its first segment and the one after its last; int64 (segments +
            1, 2): place and offset in the source.
        """
        key = form, tile, device
        if key not in self._tables:
            tiles = torch.tensor(self._list_tiles(form, tile), dtype=torch.int64)
            segments = torch.tensor(list(zip(self._begins, [*self._sources, 0], strict=True)), dtype=torch.int64)
            self._tables[key] = tiles.to(device), segments.to(device)
        return self._tables[key]

    def _list_tiles(self, form: BlockFormat, tile: int) -> list[list[int]]:
        rows, place, payload = [], 0, 0
        for count in self.counts:
            codes = payload + form.scales_bytes(count)
            for start in range(0, count, tile):
                at, stop = place + start, place + min(start + tile, count)
                first = bisect_right(self._begins, at) - 1
                last = bisect_left(self._begins, stop)
                source = self._sources[first] + at - self._begins[first]
                is_direct = stop - at == tile and last == first + 1 and source % 16 == at % 16 == 0
                scales = payload // 4 + start // form.block
                row = [at, count - start, codes + codes_bytes(start, form.bits), scales]
                rows.append([*row, source if is_direct else -1, first, last])
            place += count
            payload += form.payload_bytes(count)
        return rows


@lru_cache(maxsize=256)
def plain_runs(counts: tuple[int, ...]) -> Runs:
    """Runs of values that lie one after another; kept, with the tables that a GPU has of them."""
    return Runs(counts)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

"""Directions within a low-rank subspace of each matrix: any number of them is added by one matrix product, exactly.

The idea of SeedFlood (2602.18181, 2026), made exact. For a matrix W of (rows, columns), the stream gives signs U (rows,
r) and V (columns, r), new ones every `basis_every` rounds, and for each direction a pair i, j and a sign:

    z = +-u_i v_j^T,    so    sum_s q_s z_s = U C V^T    with    C[i_s, j_s] = the sum of +-q_s, r by r.

Each entry of z is +1 or -1. Over all bases E z z^T = I, and E <z, g>^2 = |g|^2 for a gradient g: mean and variance of
an estimate are those of directions with independent entries. What a basis costs comes from sharing it: the mean over
all of its r^2 directions is U U^T g V V^T / r^2, whose variance is about d / r^2 |g|^2 for d weights. So N
contributions within one basis have the variance

    d |g|^2 (1 / N + 1 / r^2)    instead of    d |g|^2 / N.

A basis should hold for no more than about r^2 contributions. As a new one takes (rows + columns) r signs, less than
one direction's rows * columns, it is renewed in every round by default.

Exact: U, V and C are whole numbers. A partial sum of U C, or of (U C) V^T, in whatever order it is added up, is a
whole number of at most sum |C|, and fp32 holds all of those up to 2^24. Beyond, or where PyTorch may round factors
(TF32), the product is made in fp64, which holds all up to 2^53. What is added to weights within 2^24 units is then
exact in fp32, or ends beyond 2^24, also after rounding, and is reported. Powers of two, as the unit, change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from thinwire.comm.onebyte.cell import Cell
from thinwire.comm.onebyte.directions import FullDirections, Target
from thinwire.comm.onebyte.stream import BASIS, DOMAIN_SHIFT, PICKS
from thinwire.kernels.philox import philox

_EXACT = 1 << 24
_MOST_PERIODS = 16  # bases of which a pass over the weights takes up the directions
_MOST_SIGNS = 1 << 28  # of all tensors' bases in a pass
_PART = {"cpu": 1 << 20, "cuda": 1 << 24}  # elements of a product, which on a CPU stays in the cache
_SIGNS_PER_BLOCK = 128


class _Picks(NamedTuple):
    """For each matrix and direction: the vectors of both sides, and the sign, 1 or -1. int64 (matrices, directions)."""

    left: Tensor
    right: Tensor
    sign: Tensor


class SubspaceDirections:
    """Directions u_i v_j^T for matrices with more than `rank` rows and columns; others keep full directions.

    Args:
        cells: all tensors of the run.
        rank: vectors on each side, r.
        basis_every: rounds for which a basis holds.
        full: for the other tensors.
    """

    def __init__(self, key: int, cells: Sequence[Cell], rank: int, basis_every: int, full: FullDirections) -> None:
        self._key = key
        self._rank = rank
        self._basis_every = basis_every
        self._full = full
        self._matrices = [cell for cell in cells if min(_sides(cell)) > rank]
        self._row = {cell.index: row for row, cell in enumerate(self._matrices)}
        signs = sum(sum(_sides(cell)) for cell in self._matrices) * rank
        self._periods_at_once = max(1, min(_MOST_PERIODS, _MOST_SIGNS // max(1, signs)))
        self._newest: tuple[int, list[Tensor]] | None = None

    def add(self, targets: Sequence[Target], places: Tensor) -> list[int]:
        """As Directions says; a product for each basis, and a pass over the weights for every 16 bases."""
        others = [target for target in targets if target.cell.index not in self._row]
        full = iter(self._full.add(others, places))
        matrices = [target for target in targets if target.cell.index in self._row]
        product = iter(self._add(matrices, places))
        return [next(product if target.cell.index in self._row else full) for target in targets]

    def swept(self, cells: Sequence[Cell]) -> int:
        """Those of the tensors without a subspace."""
        return self._full.swept([cell for cell in cells if cell.index not in self._row])

    def _add(self, targets: Sequence[Target], places: Tensor) -> list[int]:
        peaks = [0] * len(targets)
        needed = torch.zeros(len(places), dtype=torch.bool)
        for target in targets:
            needed |= target.units != 0
        for number, periods in enumerate(self._passes(places[needed])):
            assert number == 0 or all(out is cell.weights for cell, _, out in targets)  # or the first would be lost
            some = needed & torch.isin(places[:, 0] // self._basis_every, torch.tensor(periods))
            period_of = places[some, 0] // self._basis_every
            picks = self._pick(places[some])
            bases = [(period, self._basis(period)) for period in periods]
            for n, (cell, units, out) in enumerate(targets):
                product = _Product(cell, self._rank)
                row = self._row[cell.index]
                for period, basis in bases:
                    these = (period_of == period) & (units[some] != 0)
                    i, j, sign = (pick[row, these] for pick in picks)
                    product.take(basis[row], i, j, sign * units[some][these])
                peaks[n] = max(peaks[n], product.add_to(out))
        return peaks

    def _passes(self, places: Tensor) -> Iterator[list[int]]:
        """The periods of these directions, so many at once as a pass may take."""
        periods = sorted(set((places[:, 0] // self._basis_every).tolist()))
        for start in range(0, len(periods), self._periods_at_once):
            yield periods[start : start + self._periods_at_once]

    def _pick(self, places: Tensor) -> _Picks:
        """From the first three words of block t, for tensor t: floor(word * rank / 2^32) twice, and a bit."""
        blocks = torch.tensor([cell.index for cell in self._matrices])[:, None]
        a, b, c, _ = philox(blocks, PICKS << DOMAIN_SHIFT, places[:, 0], places[:, 1], self._key)
        return _Picks(a * self._rank >> 32, b * self._rank >> 32, 2 * (c & 1) - 1)

    def _basis(self, period: int) -> list[Tensor]:
        """For each matrix its signs of a period, int8 (rows + columns, rank): U, and V below it.

        As one flat vector they have the order of a direction's elements.
        """
        if self._newest is None or self._newest[0] != period:
            # Forgets the one before first: they may be large.
            self._newest = None
            self._newest = period, self._draw_basis(period)
        return self._newest[1]

    def _draw_basis(self, period: int) -> list[Tensor]:
        signs: dict[int, Tensor] = {}
        for device in {cell.weights.device for cell in self._matrices}:
            cells = [cell for cell in self._matrices if cell.weights.device == device]
            counts = [sum(_sides(cell)) * self._rank for cell in cells]
            blocks = [-(-count // _SIGNS_PER_BLOCK) for count in counts]
            block = torch.cat([torch.arange(number, device=device) for number in blocks])
            which = torch.tensor([cell.index | BASIS << DOMAIN_SHIFT for cell in cells], device=device)
            which = which.repeat_interleave(torch.tensor(blocks, device=device))
            time, zero = torch.tensor([period, 0], device=device)
            words = philox(block, which, time, zero, self._key)
            flat = _signs_of(torch.stack(words, dim=1))
            for cell, count, part in zip(
                cells, counts, flat.split([_SIGNS_PER_BLOCK * n for n in blocks]), strict=True
            ):
                signs[cell.index] = part[:count].view(-1, self._rank)
        return [signs[cell.index] for cell in self._matrices]


class _Product:
    """The sum of changes U C V^T of one matrix, of several bases."""

    def __init__(self, cell: Cell, rank: int) -> None:
        self._cell = cell
        self._rank = rank
        self._rows, self._columns = _sides(cell)
        self._factors: list[tuple[Tensor, Tensor, Tensor]] = []  # (U, C, V): whole numbers, int8, int64, int8
        self._bound = 0

    def take(self, basis: Tensor, i: Tensor, j: Tensor, units: Tensor) -> None:
        """Take up sum_s units[s] u_i[s] v_j[s]^T; units: int64 with their signs."""
        if not len(units):
            return
        left, right = basis.split([self._rows, self._columns])
        if len(units) <= self._rank:
            # Fewer directions than vectors: the vectors that they use, once for each.
            device = basis.device
            self._factors.append((left[:, i.to(device)], units.to(device)[None], right[:, j.to(device)]))
            self._bound += int(units.abs().sum())
            return
        sums = torch.zeros(self._rank * self._rank, dtype=torch.int64)
        sums.index_add_(0, i * self._rank + j, units)
        self._factors.append((left, sums.view(self._rank, self._rank).to(basis.device), right))
        self._bound += int(sums.abs().sum())

    def add_to(self, out: Tensor) -> int:
        """out = weights + 2^-exponent * change; returns the largest |out| * 2^exponent before rounding."""
        if not self._factors:
            return 0
        cell, device = self._cell, out.device
        # The weights are perturbed at present, perhaps. Where all sums fit, they may begin with the weights.
        fits = cell.peak + cell.amplitude + self._bound < _EXACT and cell.mask is None
        dtype = torch.float32 if self._bound < _EXACT and _fp32_products_are_exact(device) else torch.float64
        unit = 2.0**-cell.entry.exponent
        with torch.autocast(device.type, enabled=False):
            left = torch.cat([_times(u, c, dtype) for u, c, _ in self._factors], dim=1).mul_(unit)
            right = torch.cat([v.to(dtype) for _, _, v in self._factors], dim=1).t()
            weights, image = cell.weights.view(self._rows, -1), out.view(self._rows, -1)
            moves = None if cell.mask is None else _unpack(cell.mask, len(out)).view(self._rows, -1)
            peak = torch.zeros((), dtype=dtype, device=device)
            height = max(1, _PART.get(device.type, 1 << 24) // self._columns)
            for start in range(0, self._rows, height):
                part = slice(start, start + height)
                if fits and dtype == torch.float32:
                    begin = image[part].addmm_ if out is cell.weights else weights[part].addmm
                    sums = begin(left[part], right)
                else:
                    change = left[part] @ right
                    if moves is not None:
                        change *= moves[part]
                    sums = change.add_(weights[part])
                if sums.data_ptr() != image[part].data_ptr():
                    image[part].copy_(sums)
                low, high = sums.aminmax()
                peak = torch.maximum(peak, torch.maximum(-low, high))
        return int(float(peak) * 2.0**cell.entry.exponent)


def _sides(cell: Cell) -> tuple[int, int]:
    """(rows, columns) of a tensor as a matrix; a vector has one column."""
    rows = cell.entry.shape[0] if cell.entry.shape else 1
    return rows, cell.weights.numel() // max(1, rows)


def _times(signs: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """U C, or U with its columns scaled where C is given by its diagonal."""
    return signs.to(dtype) * sums.to(dtype) if len(sums) == 1 else signs.to(dtype) @ sums.to(dtype)


def _signs_of(words: Tensor) -> Tensor:
    """Bits of words (blocks, 4), lowest first, as int8 of 1 or -1."""
    octets = torch.stack([words >> shift & 0xFF for shift in (0, 8, 16, 24)], dim=-1).to(torch.uint8)
    bits = octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=words.device) & 1
    return bits.view(torch.int8).flatten().mul_(2).sub_(1)


def _unpack(mask: Tensor, count: int) -> Tensor:
    bits = mask[:, None] >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten()[:count]


def _fp32_products_are_exact(device: torch.device) -> bool:
    """Whether the products of fp32 matrices keep all 24 bits of their factors: not so if the user lets TF32 in.

    Asked of the device's own setting, which those that are older or hold for all devices end in.
    """
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    backend = torch.backends.cuda.matmul if device.type == "cuda" else mkldnn
    return backend.fp32_precision in ("none", "ieee")

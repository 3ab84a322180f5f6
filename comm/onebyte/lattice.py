"""Weights as integers: each tensor on a grid 2^-k Z, held in fp32, where every change is exact.

With |w| * 2^k < 2^24, fp32 holds each point of the grid, and adding a multiple of 2^-k is exact: so what is added can
be taken away again, the order of changes does not matter, and neither do fused multiply-adds or the device. A parameter
in fp32 is its own grid: no second copy. One in bf16 or fp16 is the rounded image of an fp32 master beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.comm.onebyte.coefficients import WeightRangeError
from thinwire.comm.onebyte.manifest import Manifest, TensorEntry
from thinwire.kernels.lattice_add import lattice_add

RANGE_BITS = 24
HEADROOM_BITS = 2  # so much may the largest weight of a tensor grow, in octaves
_FINEST = 24  # a tensor of zeros, or of tiny numbers, may grow to 1


def grid_exponent(weights: Tensor) -> int:
    """The k of a tensor's grid: its largest weight is at most 2^22 units, and weights of up to 1/4 always have room."""
    largest = float(weights.detach().abs().max()) if weights.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError("weights are NaN or infinite: fine-tuning must begin at finite ones")
    octaves = math.frexp(largest)[1] if largest else 0
    return min(_FINEST, RANGE_BITS - HEADROOM_BITS - octaves)


@dataclass
class _Cell:
    """One canonical tensor: its entry, its number, the parameter, and its weights on the grid, flat fp32."""

    entry: TensorEntry
    index: int
    parameter: Tensor
    weights: Tensor
    mask: Tensor | None = None

    @property
    def is_own_image(self) -> bool:
        return self.parameter.dtype == torch.float32


class Lattice:
    """The trained tensors of one machine, on their grids.

    Args:
        manifest: the tensors' grids, and how directions are made of the stream.
        parameters: in the manifest's order; their values are rounded to the grid.
    Raises:
        ValueError: a parameter is not contiguous, or not as the manifest says.
    """

    def __init__(self, manifest: Manifest, parameters: Sequence[Tensor], key: int) -> None:
        self.manifest = manifest
        self._key = key
        self._numerics = manifest.numerics
        self._cells = [
            _cell(entry, index, parameter)
            for index, (entry, parameter) in enumerate(zip(manifest.tensors, parameters, strict=True))
        ]
        self._amplitudes = [1 << (cell.entry.exponent + cell.entry.eps_log2) for cell in self._cells]
        self._shown: tuple[tuple[int, int], int] | None = None  # the perturbation that the parameters have now
        if self._numerics.kept < 1:
            self.choose_kept()

    def perturb(self, place: tuple[int, int], sign: int) -> None:
        """Make the parameters w + sign * eps * z, whatever they showed before."""
        places, changes = self._leave_shown()
        places.append(place)
        changes.append(sign)
        counts = torch.tensor(places, dtype=torch.int64)
        for cell, amplitude in zip(self._cells, self._amplitudes, strict=True):
            units = torch.tensor(changes if cell.is_own_image else changes[-1:], dtype=torch.int32) * amplitude
            image = cell.weights if cell.is_own_image else cell.parameter.data.view(-1)
            peak = self._add(cell, units, counts if cell.is_own_image else counts[-1:], image)
            _check_range(peak, cell.entry)
        self._shown = place, sign

    def restore(self) -> None:
        """Make the parameters w, to the last bit."""
        if self._shown is not None:
            self.add(torch.empty(len(self._cells), 0, dtype=torch.int32), torch.empty(0, 2, dtype=torch.int64))

    def add(self, coefficients: Tensor, places: Tensor) -> None:
        """w <- w + 2^-k sum_s coefficients[t, s] z_s for every tensor t, and the parameters show w: in one pass.

        Args:
            coefficients: int32 (tensors, directions).
            places: int64 (directions, 2).
        Raises:
            WeightRangeError: a weight has left the range in which its grid is exact.
        """
        shown_places, changes = self._leave_shown()
        back = torch.tensor(shown_places, dtype=torch.int64).reshape(-1, 2)
        self._shown = None
        for cell, amplitude, row in zip(self._cells, self._amplitudes, coefficients, strict=True):
            if cell.is_own_image:
                units = torch.cat((torch.tensor(changes, dtype=torch.int32) * amplitude, row))
                peak = self._add(cell, units, torch.cat((back, places)), cell.weights)
            else:
                peak = self._add(cell, row, places, cell.weights)
                cell.parameter.data.view(-1).copy_(cell.weights)
            _check_range(peak, cell.entry)

    def decay(self, rate_sum: float) -> None:
        """w <- w - round(w * decay * rate_sum), in whole units; rate_sum: of the learning rates since the last time."""
        self.restore()
        for cell in self._cells:
            share = cell.entry.decay * rate_sum
            if share:
                scale = math.ldexp(1.0, cell.entry.exponent)
                units = cell.weights.double() * scale
                # With the share as an fp32 number the product is exact in fp64, so it is rounded alike everywhere.
                lost = (units * float(torch.tensor(share, dtype=torch.float32))).round()
                cell.weights.copy_((units - lost) / scale)
                self._show(cell)

    def choose_kept(self) -> None:
        """Let only the smallest weights of each tensor move, a share `kept` of them: Sparse MeZO (2402.15751)."""
        self.restore()
        for cell in self._cells:
            sizes = cell.weights.abs()
            count = max(1, math.ceil(self._numerics.kept * sizes.numel()))
            limit = sizes.cpu().kthvalue(count).values
            cell.mask = _pack(sizes <= limit.to(sizes.device))

    def digest(self) -> bytes:
        """SHA-256 of all weights on their grids, 32 bytes: equal on machines whose weights are equal."""
        self.restore()
        whole = hashlib.sha256()
        for cell in self._cells:
            whole.update(f"{cell.entry.name} {cell.entry.exponent};".encode())
            whole.update(cell.weights.cpu().numpy().data)
        return whole.digest()

    def state(self) -> dict[str, Tensor]:
        """What is not in the parameters: masters of 16-bit parameters, and masks."""
        self.restore()
        masters = {f"{cell.entry.name}/master": cell.weights for cell in self._cells if not cell.is_own_image}
        return masters | {f"{cell.entry.name}/mask": cell.mask for cell in self._cells if cell.mask is not None}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what state() gave. Raises ValueError where something is missing or has another shape."""
        expected = self.state()
        if {n: t.shape for n, t in expected.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError(f"onebyte: the state has {sorted(state)}, these settings need {sorted(expected)}")
        for name, tensor in expected.items():
            tensor.copy_(state[name])
        for cell in self._cells:
            if not cell.is_own_image:
                self._show(cell)

    def weights(self) -> Iterable[tuple[TensorEntry, Tensor]]:
        """Each tensor's entry and its weights on the grid, flat fp32 (not a copy)."""
        self.restore()
        return ((cell.entry, cell.weights) for cell in self._cells)

    def _leave_shown(self) -> tuple[list[tuple[int, int]], list[int]]:
        if self._shown is None:
            return [], []
        place, sign = self._shown
        return [place], [-sign]

    def _add(self, cell: _Cell, units: Tensor, places: Tensor, out: Tensor) -> int:
        return lattice_add(
            cell.weights,
            units,
            places,
            key=self._key,
            tensor=cell.index,
            exponent=cell.entry.exponent,
            distribution=self._numerics.distribution,
            mask=cell.mask,
            out=out,
        )

    def _show(self, cell: _Cell) -> None:
        if not cell.is_own_image:
            cell.parameter.data.view(-1).copy_(cell.weights)


def _cell(entry: TensorEntry, index: int, parameter: Tensor) -> _Cell:
    dtype = str(parameter.dtype).removeprefix("torch.")
    if tuple(parameter.shape) != entry.shape or dtype != entry.dtype:
        raise ValueError(
            f"onebyte: {entry.name} is {dtype}{list(parameter.shape)}, the run's is {entry.dtype}{list(entry.shape)}"
        )
    if not parameter.is_contiguous():
        raise ValueError(f"onebyte: {entry.name} is not contiguous; make it so with .contiguous()")
    scale = math.ldexp(1.0, entry.exponent)
    flat = parameter.detach().view(-1)
    weights = flat if parameter.dtype == torch.float32 else flat.float()
    weights.mul_(scale).round_().div_(scale)  # a power of two: only the rounding rounds
    cell = _Cell(entry, index, parameter, weights)
    if not cell.is_own_image:
        flat.copy_(weights)
    return cell


def _check_range(peak: int, entry: TensorEntry) -> None:
    if peak >> RANGE_BITS:
        raise WeightRangeError(
            f"{entry.name} has grown to {math.ldexp(peak, -entry.exponent):.3g}, beyond what its grid holds, "
            f"{math.ldexp(1.0, RANGE_BITS - entry.exponent):g}: lower the learning rate; or, if it should grow so far, "
            "begin a new run at weights of this one"
        )


def _pack(bits: Tensor) -> Tensor:
    """Bits as bytes, the first one lowest."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)

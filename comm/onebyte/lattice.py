"""Weights as integers: each tensor on a grid 2^-k Z, held in fp32, where every change is exact.

With |w| * 2^k < 2^24, fp32 holds each point of the grid, and adding a multiple of 2^-k is exact: so what is added can
be taken away again, the order of changes does not matter, and neither do fused multiply-adds or the device. A parameter
in fp32 is its own grid: no second copy. One in bf16 or fp16 is the rounded image of an fp32 master beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from thinwire.comm.onebyte.cell import RANGE_BITS, Cell
from thinwire.comm.onebyte.directions import Directions, FullDirections, Target
from thinwire.comm.onebyte.errors import TornWeightsError, WeightRangeError
from thinwire.comm.onebyte.manifest import Manifest, TensorEntry
from thinwire.comm.onebyte.stream import LARGEST_ELEMENT
from thinwire.comm.onebyte.subspace import SubspaceDirections

HEADROOM_BITS = 2  # so much may the largest weight of a tensor grow, in octaves
_FINEST = 24  # a tensor of zeros, or of tiny numbers, may grow to 1


def grid_exponent(weights: Tensor, reach: float = 0.0) -> int:
    """The k of a tensor's grid: its largest weight is at most 2^22 units, and weights of up to 1/4 always have room.

    Args:
        reach: how far a perturbation takes a weight; also at most 2^22 units.
    """
    largest = float(weights.detach().abs().max()) if weights.numel() else 0.0
    if not math.isfinite(largest):
        raise ValueError("weights are NaN or infinite: fine-tuning must begin at finite ones")
    largest = max(largest, reach)
    octaves = math.frexp(largest)[1] if largest else 0
    return min(_FINEST, RANGE_BITS - HEADROOM_BITS - octaves)


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
        self._numerics = manifest.numerics
        self._reach = LARGEST_ELEMENT[manifest.numerics.distribution]
        self._cells = [
            Cell(entry, index, parameter)
            for index, (entry, parameter) in enumerate(zip(manifest.tensors, parameters, strict=True))
        ]
        self._directions = _directions_of(manifest, key, self._cells)
        self._torn = False
        if self._numerics.kept < 1:
            self.choose_kept()

    def perturb(self, place: tuple[int, int], sign: int) -> None:
        """Make the parameters w + sign * eps * z, whatever they showed before.

        Raises:
            WeightRangeError: that could leave the range of a grid; nothing has changed.
        """
        for cell in self._cells:
            if (cell.peak + cell.amplitude * self._reach) >> RANGE_BITS:
                raise WeightRangeError(
                    f"{cell.entry.name} has grown to {math.ldexp(cell.peak, -cell.entry.exponent):.3g}: with eps it "
                    f"would leave what its grid holds, {cell.limit:g}. {_ADVICE}"
                )
        self._change([(cell, _int32([sign * cell.amplitude]), cell.image) for cell in self._cells], _int64([place]))
        for cell in self._cells:
            cell.shown = place, sign

    def restore(self) -> None:
        """Make the parameters w, to the last bit."""
        self._check_whole()
        shown = [cell for cell in self._cells if cell.shown is not None]
        self._change([(cell, _int32([]), cell.image) for cell in shown if cell.is_own_image], _int64([]))
        for cell in shown:
            cell.show()

    def add(self, coefficients: Tensor, places: Tensor) -> None:
        """w <- w + 2^-k sum_s coefficients[t, s] z_s for every tensor t, and the parameters show w: in one pass.

        Args:
            coefficients: int32 (tensors, directions).
            places: int64 (directions, 2).
        Raises:
            WeightRangeError: a weight would leave the range in which its grid is exact; no weight has changed.
        """
        moves = (coefficients.abs().sum(dim=1) * self._reach).tolist()
        changes = list(zip(self._cells, coefficients, moves, strict=True))
        risky = [(cell, row) for cell, row, move in changes if (cell.peak + move) >> RANGE_BITS]
        safe = [(cell, row) for cell, row, move in changes if not (cell.peak + move) >> RANGE_BITS]
        before = [(cell, cell.weights.clone(), cell.shown) for cell, _ in risky]
        try:
            self._add(risky, places)
        except WeightRangeError:
            for cell, weights, shown in before:
                cell.weights.copy_(weights)
                cell.shown = shown
            raise
        self._add(safe, places)

    @property
    def swept_elements(self) -> int:
        """Weights for each of which one more direction takes a random number of its own."""
        return self._directions.swept(self._cells)

    @property
    def device(self) -> torch.device:
        """Where the first tensor is."""
        return self._cells[0].weights.device

    def decay(self, rate_sum: float) -> None:
        """w <- w - round(w * decay * rate_sum), in whole units; rate_sum: of the learning rates since the last time."""
        self.restore()
        for cell in self._cells:
            share = cell.entry.decay * cell.entry.rate_scale * rate_sum
            if share:
                scale = math.ldexp(1.0, cell.entry.exponent)
                units = cell.weights.double() * scale
                # With the share as an fp32 number the product is exact in fp64, so it is rounded alike everywhere.
                lost = (units * float(torch.tensor(share, dtype=torch.float32))).round()
                cell.weights.copy_((units - lost) / scale)
                cell.show()

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

    def rebuild(self, weights: Mapping[str, Tensor]) -> None:
        """Begin again at these weights, by name: the base weights."""
        for cell in self._cells:
            cell.put(weights[cell.entry.name])
        self._torn = False
        if self._numerics.kept < 1:
            self.choose_kept()

    def check_untouched(self) -> None:
        """Raise a ValueError that names a parameter which somebody else has moved off its grid, or to other memory."""
        for cell in self._cells:
            cell.check_untouched()

    def state(self) -> dict[str, Tensor]:
        """What is not in the parameters: masters of 16-bit parameters, and masks."""
        self.restore()
        masters = {f"{cell.entry.name}/master": cell.weights for cell in self._cells if not cell.is_own_image}
        return masters | {f"{cell.entry.name}/mask": cell.mask for cell in self._cells if cell.mask is not None}

    def check_state(self, state: dict[str, Tensor]) -> None:
        """Raise a ValueError if something is missing in what state() should have given, or has another shape."""
        expected = self.state()
        if {n: t.shape for n, t in expected.items()} != {n: t.shape for n, t in state.items()}:
            raise ValueError(f"onebyte: the state has {sorted(state)}, these settings need {sorted(expected)}")

    def load(self, state: dict[str, Tensor]) -> None:
        """Take back what state() gave. Raises ValueError where something is missing or has another shape."""
        self.check_state(state)
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        for cell in self._cells:
            cell.show()

    def weights(self) -> Iterable[tuple[TensorEntry, Tensor]]:
        """Each tensor's entry and its weights on the grid, flat fp32 (not a copy)."""
        self.restore()
        return ((cell.entry, cell.weights) for cell in self._cells)

    def _add(self, changes: Sequence[tuple[Cell, Tensor]], places: Tensor) -> None:
        peaks = self._change([(cell, row, cell.weights) for cell, row in changes], places)
        for (cell, _), peak in zip(changes, peaks, strict=True):
            if peak >> RANGE_BITS:
                raise WeightRangeError(
                    f"{cell.entry.name} would grow to {math.ldexp(peak, -cell.entry.exponent):.3g}, beyond what its "
                    f"grid holds, {cell.limit:g}. {_ADVICE}"
                )
        for (cell, _), peak in zip(changes, peaks, strict=True):
            cell.peak = peak or cell.peak
            cell.show()

    def _change(self, changes: Sequence[tuple[Cell, Tensor, Tensor]], places: Tensor) -> list[int]:
        """Add units[s] z_s to each cell's weights, from which the perturbation that they have is taken away, into out.

        An fp32 parameter is perturbed itself, so its weights are; of others only the image is.
        """
        self._check_whole()
        targets = [Target(*change) for change in changes]
        perturbed = {cell.shown for cell, _, _ in targets if cell.is_own_image and cell.shown is not None}
        assert len(perturbed) <= 1
        for place, sign in perturbed:
            back = [-sign * cell.amplitude if cell.is_own_image and cell.shown else 0 for cell, _, _ in targets]
            targets = [
                Target(cell, torch.cat((_int32([units]), row)), out)
                for units, (cell, row, out) in zip(back, targets, strict=True)
            ]
            places = torch.cat((_int64([place]), places))
        self._torn = True
        peaks = self._directions.add(targets, places)
        self._torn = False
        return peaks

    def _check_whole(self) -> None:
        if self._torn:
            raise TornWeightsError(
                "OneByteSPSA: a change of the weights was interrupted in its midst, so they are not those of the run "
                "any more; build the optimizer anew, on the base weights and with the log"
            )


_ADVICE = "Lower the learning rate; or, if it should grow so far, begin a new run at weights of this one"


def _directions_of(manifest: Manifest, key: int, cells: Sequence[Cell]) -> Directions:
    numerics = manifest.numerics
    full = FullDirections(key, numerics.distribution)
    if numerics.directions == "subspace":
        return SubspaceDirections(key, cells, numerics.rank, numerics.basis_every, full)
    return full


def _int32(numbers: list[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def _int64(places: list[tuple[int, int]]) -> Tensor:
    return torch.tensor(places, dtype=torch.int64).reshape(-1, 2)


def _pack(bits: Tensor) -> Tensor:
    """Bits as bytes, the first one lowest."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    return (padded * weights).sum(dim=1, dtype=torch.uint8)

"""How the directions of a run are added to its weights: all at once, exactly, in any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from thinwire.comm.onebyte.cell import Cell
from thinwire.kernels.lattice_add import lattice_add
from thinwire.kernels.philox import Distribution


class Target(NamedTuple):
    """A change of one tensor: out = weights + 2^-exponent * sum_s units[s] z_s; units: int32 (directions,), on the CPU.

    out: flat, in the parameter's dtype; the weights themselves, or the parameter.
    """

    cell: Cell
    units: Tensor
    out: Tensor


class Directions(Protocol):
    """A kind of direction. z_s depends on the run's key, the tensor's number and its place alone."""

    def add(self, targets: Sequence[Target], places: Tensor) -> list[int]:
        """Carry out changes of several tensors.

        Args:
            places: int64 (directions, 2), on the CPU.
        Returns: for each target its largest |out| * 2^exponent before rounding, or 0 if it did not change.
        """
        ...

    def swept(self, cells: Sequence[Cell]) -> int:
        """Elements of these tensors for each of which a further direction takes a random number of its own."""
        ...


class FullDirections:
    """Directions with an entry of their own for each weight: one more costs one more sweep of random numbers."""

    def __init__(self, key: int, distribution: Distribution) -> None:
        self._key = key
        self._distribution = distribution

    def add(self, targets: Sequence[Target], places: Tensor) -> list[int]:
        """As Directions says, in one pass over each tensor."""
        return [self._add(target, places) for target in targets]

    def swept(self, cells: Sequence[Cell]) -> int:
        """All."""
        return sum(cell.weights.numel() for cell in cells)

    def _add(self, target: Target, places: Tensor) -> int:
        cell, units, out = target
        device, some = cell.weights.device, units != 0  # small steps round to 0 in most directions
        return lattice_add(
            cell.weights,
            units[some].to(device),
            places[some].to(device),
            key=self._key,
            tensor=cell.index,
            exponent=cell.entry.exponent,
            distribution=self._distribution,
            mask=cell.mask,
            out=out,
        )

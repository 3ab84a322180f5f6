"""One trained tensor: the parameter that the model sees, and its weights on the grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thinwire.comm.onebyte.manifest import TensorEntry

RANGE_BITS = 24


class Cell:
    """A tensor of the run, flat.

    The parameter's values are rounded to the grid: by half a unit at most.

    Attributes:
        weights: fp32, on the grid; the parameter's own memory where that is fp32.
        image: the parameter's memory.
        peak: no weight is larger, in units.
        amplitude: eps in units.
        shown: place and sign of the perturbation that the image has.
        mask: bits of the elements that move; None: all.
    Raises:
        ValueError: the parameter is not as the entry says, or not contiguous.
    """

    def __init__(self, entry: TensorEntry, index: int, parameter: Tensor) -> None:
        dtype = str(parameter.dtype).removeprefix("torch.")
        if tuple(parameter.shape) != entry.shape or dtype != entry.dtype:
            raise ValueError(
                f"onebyte: {entry.name} is {dtype}{list(parameter.shape)}, the run's is "
                f"{entry.dtype}{list(entry.shape)}"
            )
        if not parameter.is_contiguous():
            raise ValueError(f"onebyte: {entry.name} is not contiguous; make it so with .contiguous()")
        self.entry = entry
        self.index = index
        self.parameter = parameter
        self.image = parameter.data.view(-1)  # .data: what is done here does not count as a change from outside
        self.is_own_image = parameter.dtype == torch.float32
        self.weights = self.image if self.is_own_image else self.image.float()
        self.amplitude = 1 << (entry.exponent + entry.eps_log2)
        self.shown: tuple[tuple[int, int], int] | None = None
        self.mask: Tensor | None = None
        self.peak = 0
        self._version = parameter._version
        self.put(parameter.data)

    @property
    def limit(self) -> float:
        """Weights must stay below."""
        return math.ldexp(1.0, RANGE_BITS - self.entry.exponent)

    def put(self, values: Tensor) -> None:
        """Take values from outside, in the parameter's dtype, to the grid."""
        self.weights.copy_(values.detach().reshape(-1))
        # Powers of two: only the rounding rounds. Adding 0 makes +0 of -0, which the grid has not.
        self.weights.mul_(self._scale).round_().div_(self._scale).add_(0.0)
        self.peak = self._measured_peak()
        self.show()

    def show(self) -> None:
        """Make the image that of the weights themselves."""
        self.shown = None
        if not self.is_own_image:
            self.image.copy_(self.weights)

    def check_untouched(self) -> None:
        """Take notice of values that somebody else has written into the parameter, if they lie on the grid.

        Raises:
            ValueError: they do not, or the parameter has moved to other memory.
        """
        if self.parameter.data_ptr() != self.image.data_ptr():
            raise ValueError(
                f"OneByteSPSA: {self.entry.name} has moved to other memory; build the optimizer after model.to(...), "
                "and write new weights with copy_() or load_state_dict()"
            )
        if self.parameter._version == self._version:
            return
        if self.is_own_image:
            units = self.weights * self._scale
            fits = bool((units == units.round()).all()) and not self._measured_peak() >> RANGE_BITS
        else:
            fits = torch.equal(self.image, self.weights.to(self.image.dtype))
        if not fits:
            raise ValueError(
                f"OneByteSPSA: {self.entry.name} was changed from outside, to weights that are not of this run; load "
                "weights before the optimizer is built, and a state of this run into the model and the optimizer both"
            )
        self.peak = self._measured_peak()
        self._version = self.parameter._version

    @property
    def _scale(self) -> float:
        return math.ldexp(1.0, self.entry.exponent)

    def _measured_peak(self) -> int:
        largest = float(self.weights.abs().max()) * self._scale if self.weights.numel() else 0.0
        return int(largest) if math.isfinite(largest) else 1 << RANGE_BITS

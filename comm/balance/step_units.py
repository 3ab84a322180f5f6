"""Which micro-batch of which step a call belongs to, told by the calls alone."""

from __future__ import annotations

import itertools

from torch import Tensor

from thinwire.comm.balance.layer_map import LayerMap
from thinwire.comm.balance.modes.mode import Mode, Setting
from thinwire.comm.balance.unit import Unit


class StepUnits:
    """The units of the present step. Tells the mode when one is filled, and when a step ends and begins.

    A unit is filled when every layer has counted. While the layers are still being learned, that is known only when one
    of them is called again, or a backward pass begins.

    Attributes: announced, valid tokens that this rank expects in the next step; 0 = unknown. ended, steps that have,
    since the start.
    """

    def __init__(self, layers: LayerMap, mode: Mode, setting: Setting) -> None:
        self.announced = 0
        self.ended = 0
        self._layers = layers
        self._mode = mode
        self._setting = setting
        self._numbers = itertools.count()
        self._units: list[Unit] = []
        self._is_over = False

    @property
    def filled(self) -> list[Unit]:
        """Of the present step, in order."""
        return [unit for unit in self._units if unit.is_filled]

    @property
    def is_over(self) -> bool:
        """Whether the next forward pass begins another step."""
        return self._is_over or not self._units

    def put(self, layer: int, row: Tensor) -> Unit:
        """What a layer has counted, in a forward pass; returns the unit it belongs to."""
        if self._units and layer in self._units[-1]:
            self._fill(self._units[-1])
        if not self._units or self._units[-1].is_filled:
            self._open()
        unit = self._units[-1]
        unit.put(layer, row)
        if self._layers.complete and len(unit) == len(self._layers):
            self._fill(unit)
        return unit

    def unit(self, number: int) -> Unit:
        """A unit of the present step.

        Raises:
            ValueError: it is of an earlier one.
        """
        found = next((unit for unit in self._units if unit.number == number), None)
        if found is None:
            raise ValueError(
                "layer: a backward pass came after the next step's forward pass had begun; finish a step's backward "
                "passes first, and set micro_batches to the number of forward passes in a step"
            )
        return found

    def forward_is_over(self) -> None:
        """A backward pass has begun: the layers that were called are all there are."""
        if self._units:
            self._fill(self._units[-1])

    def end(self) -> None:
        """The present step has no more units."""
        self.forward_is_over()
        self._end()

    def abandon(self) -> None:
        """A fault ends the present step, and what was under way with it."""
        self.forget()
        self._mode.abandon()

    def forget(self) -> None:
        """As at the start."""
        self._units, self._is_over = [], False

    def _open(self) -> None:
        if self.is_over:
            self.forget()
            self._mode.begin_step()
        announced, self.announced = self.announced, 0
        self._units.append(Unit(next(self._numbers), len(self._units), announced))

    def _fill(self, unit: Unit) -> None:
        if unit.is_filled:
            return
        self._layers.complete = True
        missing = [name for number, name in enumerate(self._layers.names) if number not in unit]
        if missing:
            self._units.remove(unit)  # whoever has caught what broke the forward pass off can try again
            raise ValueError(
                f"layer: a forward pass has ended, or begun anew, without {', '.join(missing[:3])}; every layer calls "
                "balance once in every forward pass: give each router a name of its own, and run what is thrown away "
                "under torch.no_grad()"
            )
        unit.is_filled = True
        self._mode.filled(unit)
        if unit.place == self._setting.micro_batches - 1:
            self._end()

    def _end(self) -> None:
        if self._units and not self._is_over:
            self._is_over = True
            self.ended += 1
            self._mode.end_step()

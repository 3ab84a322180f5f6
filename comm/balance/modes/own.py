"""The scope micro: every micro-batch is balanced against itself, and nothing is sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.balance.modes.mode import KnownStep, Setting
from thinwire.comm.balance.target import Target, target_of
from thinwire.comm.balance.unit import Unit


class Own:
    """f = the micro-batch's own: what most frameworks do. The loss is the mean over micro-batches and ranks.

    For comparison, and where experts must be balanced within a micro-batch, for speed.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._rows: Tensor | None = None
        self._units: list[Unit] = []
        self._cached: tuple[int, Target] | None = None

    def filled(self, unit: Unit) -> None:
        """Kept for last_step()."""
        self._units.append(unit)

    def end_step(self) -> None:
        """Add up this rank's step."""
        self._rows = torch.stack([unit.rows for unit in self._units]).sum(0, dtype=torch.int64)
        self._units = []

    def begin_step(self) -> None:
        """Nothing is under way."""

    def abandon(self) -> None:
        """Only this rank's present step."""
        self._units, self._cached = [], None

    def target(self, unit: Unit) -> Target:
        """Its own counts; as many tokens as if all micro-batches had as many."""
        if self._cached is None or self._cached[0] != unit.number:
            self._setting.bus.check(unit.rows)
            columns = self._setting.columns
            tokens = unit.rows[:, columns.tokens] * (self._setting.size * self._setting.micro_batches)
            self._cached = unit.number, target_of(unit.rows, tokens, columns)
        return self._cached[1]

    def last_step(self) -> Tensor | None:
        """This rank's own."""
        return self._rows

    def known_step(self) -> KnownStep | None:
        """This rank's own, by itself."""
        return None if self._rows is None else KnownStep(self._rows, None, self_weight=1.0)

    def state_dict(self) -> dict[str, Any]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing was remembered."""

    def resized(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """Nothing was remembered."""
        return states[0]

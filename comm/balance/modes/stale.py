"""Modes that never wait for this step's counts: stale and ema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.balance.bus import Sent
from thinwire.comm.balance.modes.mode import KnownStep, Setting
from thinwire.comm.balance.target import Target, fractions_of
from thinwire.comm.balance.unit import Unit


class Stale:
    """One message per step, sent when the step's last forward pass ends, and read in the next step's backward pass.

    F_t, against which step t is balanced, is f_{t-1}, the shares of the step before (decay 0), or the moving average
    F_t = decay * F_{t-1} + (1 - decay) * f_{t-1}, begun at the first f. The first step has F = 1 / E, whose loss has no
    gradient. A micro-batch's own counts are not in its F, so nothing of the micro-batch loss's bias is left, and while
    the router moves slowly F is a better estimate of the population's shares than the batch's own are; it lags where
    the router moves fast. The step's tokens are taken to be as many as those of the step before.

    Args:
        decay: of the moving average; 0 = the last step alone.
    """

    def __init__(self, setting: Setting, *, decay: float = 0.0) -> None:
        self._setting = setting
        self._decay = decay
        self._units: list[Unit] = []
        self._present: Sent | None = None  # of this step
        self._previous: Sent | None = None  # of the step before, not yet read
        self._rows: Tensor | None = None  # of the last message that was read
        self._average: Tensor | None = None
        self._target: Target | None = None
        self._known: KnownStep | None = None

    def filled(self, unit: Unit) -> None:
        """Nothing is sent yet."""
        self._units.append(unit)

    def end_step(self) -> None:
        """One message, about all micro-batches of the step."""
        rows = torch.stack([unit.rows for unit in self._units]).sum(0, dtype=torch.int32)
        self._present = self._setting.bus.send(rows, near=self._setting.near)
        self._units = []

    def begin_step(self) -> None:
        """What was sent is read when it is needed."""
        self._read_previous()
        self._previous, self._present, self._target = self._present, None, None

    def abandon(self) -> None:
        """The moving average stays."""
        self._previous = self._present = self._target = None
        self._units = []

    def target(self, unit: Unit) -> Target:
        """Waits for the last step's message, which had a backward pass, and more, to arrive in."""
        if self._target is None:
            self._read_previous()
            self._target = self._of_rows() or self._unknown(unit)
        return self._target

    def last_step(self) -> Tensor | None:
        """Waits for the message that was sent last."""
        sent = self._present or self._previous
        return sent.wait().rows if sent else self._rows

    def known_step(self) -> KnownStep | None:
        """The step before this one."""
        return self._known

    def state_dict(self) -> dict[str, Any]:
        """The moving average with the last step in it."""
        rows, average = self._rows, self._average
        for sent in (self._previous, self._present):
            if sent is not None:
                rows = sent.wait().rows
                average = self._next(average, rows)
        return {"before": rows, "average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """They are the same on every rank. Of other modes too, where the average begins at the last step."""
        self.abandon()
        columns = self._setting.columns
        self._rows, self._average = columns.fit(state.get("before")), state.get("average")
        if self._average is None and self._rows is not None:
            self._average = fractions_of(self._rows, columns)
        self._known = None

    def resized(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """They are the same in all states."""
        return states[0]

    def _read_previous(self) -> None:
        sent, self._previous = self._previous, None
        if sent is not None:
            self._rows = sent.wait().rows
            self._known = KnownStep(self._rows, self._average, self_weight=0.0)
            self._average = self._next(self._average, self._rows)

    def _next(self, average: Tensor | None, rows: Tensor) -> Tensor:
        fractions = fractions_of(rows, self._setting.columns)
        return fractions if average is None else self._decay * average.to(rows.device) + (1 - self._decay) * fractions

    def _of_rows(self) -> Target | None:
        if self._rows is None or self._average is None:
            return None
        tokens = self._rows[:, self._setting.columns.tokens].double() * self._setting.groups
        return Target(self._average, tokens.clamp(min=1.0))

    def _unknown(self, unit: Unit) -> Target:
        """Before the first message was read: nothing pulls, and all ranks and micro-batches are as large as this."""
        rows, columns = unit.rows, self._setting.columns
        tokens = rows[:, columns.tokens].double() * (self._setting.size * self._setting.micro_batches)
        return Target(fractions_of(torch.zeros_like(rows), columns), tokens.clamp(min=1.0))

"""Modes that wait for the counts of this step: sync, late and carry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.balance.bus import Sent, Totals
from thinwire.comm.balance.modes.mode import KnownStep, Setting
from thinwire.comm.balance.target import Target, target_of
from thinwire.comm.balance.unit import Unit


class Prefix:
    """Every micro-batch's counts are sent when its forward pass ends, and waited for in its backward pass.

    Qiu et al. 2025 (2501.11873), algorithm 1, without its blocking message in each layer. C_m = sum over ranks and over
    the micro-batches 1..m of this step; M = micro-batches in a step:

        sync    f of micro-batch m ~ C_m: the paper's buffer.
        carry   f of micro-batch m ~ C_m + (M - m) / M * C of the last step: those to come are taken from there.
        late    f ~ C of all micro-batches that have been counted by the time of the backward pass. The whole step where
                all forward passes come first (GPipe's order, or one backward pass of the summed losses); then the
                gradient is exactly that of one process with one big batch. As sync where they alternate.

    Args:
        late, carry: as above; sync is neither.
    """

    def __init__(self, setting: Setting, *, late: bool = False, carry: bool = False) -> None:
        self._setting = setting
        self._late = late
        self._carry = carry
        self._sent: list[Sent] = []
        self._sums: list[Totals] = []
        self._before: Tensor | None = None  # rows of the last step
        self._cached: tuple[int, Target] | None = None
        self._weights: dict[int, float] = {}
        self._known: KnownStep | None = None

    def filled(self, unit: Unit) -> None:
        """One message."""
        assert unit.place == len(self._sent)
        near, place = self._setting.near, unit.place
        self._sent.append(self._setting.bus.send(unit.rows, unit.announced, near=near, place=place))

    def end_step(self) -> None:
        """All is sent."""

    def begin_step(self) -> None:
        """Keep the sums of the step, and begin anew."""
        self._before = self.last_step()
        self._known = self.known_step()
        self._sent, self._sums, self._cached, self._weights = [], [], None, {}

    def abandon(self) -> None:
        """What is known of the last step stays."""
        self._sent, self._sums, self._cached, self._weights = [], [], None, {}

    def target(self, unit: Unit) -> Target:
        """Waits for the messages up to this micro-batch's (late: for all that were sent)."""
        place = len(self._sent) - 1 if self._late else unit.place
        self._weights[unit.place] = self._weight(place)
        if self._cached is None or self._cached[0] != place:
            self._cached = place, self._target(place)
        return self._cached[1]

    def last_step(self) -> Tensor | None:
        """Waits for the last message."""
        return self._sum(len(self._sent) - 1).rows if self._sent else self._before

    def known_step(self) -> KnownStep | None:
        """The present step once all its messages were waited for, else the one before.

        A micro-batch that was balanced against n units, its own one of them, had the weight 1 / n there.
        """
        if self._sums and len(self._sums) == len(self._sent):
            weights = list(self._weights.values())
            used = self._cached[1].fractions if self._cached else None
            return KnownStep(self._sums[-1].rows, used, sum(weights) / len(weights) if weights else 0.0)
        return self._known

    def state_dict(self) -> dict[str, Any]:
        """The sums of the last step."""
        return {"before": self.last_step()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """They are the same on every rank. Of other modes too."""
        self.abandon()
        self._before = self._setting.columns.fit(state.get("before"))
        self._known = None

    def resized(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """They are the same in all states."""
        return states[0]

    def _weight(self, place: int) -> float:
        units = self._setting.micro_batches if self._carry and self._before is not None else place + 1
        return self._setting.groups / (self._setting.size * units)

    def _sum(self, place: int) -> Totals:
        while len(self._sums) <= place:
            totals = self._sent[len(self._sums)].wait()
            self._sums.append(self._sums[-1] + totals if self._sums else totals)
        return self._sums[place]

    def _target(self, place: int) -> Target:
        columns, of_step = self._setting.columns, self._setting.micro_batches
        totals, seen = self._sum(place), place + 1
        tokens = totals.rows[:, columns.tokens].double() * (of_step / seen)
        tokens = torch.where(totals.announced > 0, totals.announced.double(), tokens)
        rows = totals.rows.double()
        if self._carry and self._before is not None:
            rows = rows + self._before.to(rows) * ((of_step - seen) / of_step)
        return target_of(rows, tokens * self._setting.groups, columns)

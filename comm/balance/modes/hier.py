"""The mode hier: near ranks' counts of this step, far ranks' counts of the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.balance.bus import Sent, Totals
from thinwire.comm.balance.errors import FAULTS
from thinwire.comm.balance.modes.mode import KnownStep, Setting
from thinwire.comm.balance.target import Target, target_of
from thinwire.comm.balance.unit import Unit


class Hier:
    """One message per micro-batch to near ranks, waited for in its backward pass; one per step to all, not waited for.

    With A_m the counts of the near ranks in the micro-batches 1..m of this step, A' theirs in all of the last step, and
    C' those of all ranks in the last step,

        f of micro-batch m ~ A_m + m / M * (C' - A'),

    as many micro-batches of the far ranks, taken from the last step, as there are near ones. In the first step the near
    ranks stand for all. A micro-batch's own weight in its f is 1 / (m * ranks), as in mode sync.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._units: list[Unit] = []
        self._near: list[Sent] = []
        self._sums: list[Totals] = []  # A_1, A_2, ...
        self._weights: dict[int, float] = {}
        self._cached: tuple[int, Target] | None = None
        self._present: Sent | None = None  # to all
        self._previous: tuple[Sent, Tensor, Tensor | None, float] | None = None  # not yet read; A', f, own weight in it
        self._rows: Tensor | None = None  # C'
        self._far: Tensor | None = None  # C' - A'
        self._known: KnownStep | None = None

    def abandon(self) -> None:
        """What is known of the last step stays."""
        self._units, self._near, self._sums, self._weights, self._cached = [], [], [], {}, None
        self._present = self._previous = None

    def filled(self, unit: Unit) -> None:
        """One message to the near ranks."""
        assert unit.place == len(self._near)
        self._units.append(unit)
        self._near.append(self._setting.bus.send(unit.rows, unit.announced, near=True, place=unit.place))

    def end_step(self) -> None:
        """One message to all."""
        self._send_to_all()

    def begin_step(self) -> None:
        """What was sent to all is read when it is needed."""
        self._read_previous()
        present, near = self._present, self._sum(len(self._near) - 1).rows if self._near else None
        used = self._cached[1].fractions if self._cached else None
        weights = list(self._weights.values())
        self.abandon()
        if present is not None and near is not None:
            self._previous = present, near, used, sum(weights) / len(weights) if weights else 0.0

    def target(self, unit: Unit) -> Target:
        """Waits for the near ranks' messages up to this micro-batch's, and for the last step's to all."""
        self._read_previous()
        seen = unit.place + 1
        ranks = len(self._setting.bus.inner) if self._far is None else self._setting.size
        self._weights[unit.place] = 1 / (ranks * seen)
        if self._cached is None or self._cached[0] != seen:
            self._cached = seen, self._target(self._sum(unit.place), seen / self._setting.micro_batches)
        return self._cached[1]

    def last_step(self) -> Tensor | None:
        """Waits for the message to all that was sent last."""
        sent = self._present or (self._previous[0] if self._previous else None)
        return sent.wait().rows if sent else self._rows

    def known_step(self) -> KnownStep | None:
        """The step before this one."""
        return self._known

    def state_dict(self) -> dict[str, Any]:
        """Counts of the last step: of all ranks, and of those near this one."""
        self.begin_step()
        self._read_previous()
        near = None if self._rows is None or self._far is None else self._rows - self._far
        return {"before": self._rows, "near": near}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of other modes too, and of other near ranks: then near ranks are taken to have counted as all did."""
        self.abandon()
        self._known = self._far = None
        self._rows = self._setting.columns.fit(state.get("before"))
        near = self._setting.columns.fit(state.get("near"))
        if self._rows is not None:
            share = len(self._setting.bus.inner) / self._setting.size
            self._far = self._rows - near if near is not None else self._rows * (1 - share)

    def resized(self, states: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        """All ranks' counts are the same in all states; who is near has changed."""
        return {"before": states[0]["before"]}

    def _target(self, near: Totals, part: float) -> Target:
        """Args: part, of the step that is counted in `near`."""
        columns = self._setting.columns
        tokens = near.rows[:, columns.tokens] / part
        tokens = torch.where(near.announced > 0, near.announced.double(), tokens)
        if self._far is None:
            return target_of(near.rows, tokens * (self._setting.size / len(self._setting.bus.inner)), columns)
        far = self._far.to(device=near.rows.device, dtype=torch.float64)
        return target_of(near.rows + part * far, tokens + far[:, columns.tokens], columns)

    def _sum(self, place: int) -> Totals:
        while len(self._sums) <= place:
            try:
                totals = self._near[len(self._sums)].wait()
            except FAULTS:
                # Far ranks wait for this step's message to all: it tells them of the fault too.
                if self._present is None:
                    self._send_to_all()
                raise
            self._sums.append(self._sums[-1] + totals if self._sums else totals)
        return self._sums[place]

    def _send_to_all(self) -> None:
        rows = torch.stack([unit.rows for unit in self._units]).sum(0, dtype=torch.int32)
        self._present = self._setting.bus.send(rows)

    def _read_previous(self) -> None:
        previous, self._previous = self._previous, None
        if previous is not None:
            sent, near, used, weight = previous
            self._rows = sent.wait().rows
            self._far = self._rows - near
            self._known = KnownStep(self._rows, used, weight)

"""One machine's weights as a function of the base weights and the log: the same on every machine, bit for bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.onebyte.coefficients import Slopes, coefficients, slopes_of
from thinwire.comm.onebyte.lattice import Lattice
from thinwire.comm.onebyte.manifest import Manifest
from thinwire.comm.onebyte.rounds import Round
from thinwire.comm.onebyte.step_size import Pace, next_pace
from thinwire.comm.onebyte.stream import key_of

_UNDOABLE = 4


@dataclass(frozen=True)
class _Progress:
    """rate_sum: of the learning rates since the last snapshot."""

    rounds: int = 0
    rate_sum: float = 0.0
    pace: Pace = field(default_factory=Pace)


class Replica:
    """Carries out committed rounds on the weights of this machine.

    Every `snapshot_every` rounds comes a snapshot: weight decay, and which weights move (`kept` < 1), are settled there
    and hold until the next. Between them the order of contributions does not matter.

    Args:
        manifest: of the run.
        parameters: the trained tensors, in the manifest's order, with the base weights.
    Attributes: rounds, how many are carried out.
    """

    def __init__(self, manifest: Manifest, parameters: Sequence[Tensor]) -> None:
        self.manifest = manifest
        self._key = key_of(manifest.to_bytes())
        self.lattice = Lattice(manifest, parameters, self._key)
        self._progress = _Progress()
        self._before: deque[_Progress] = deque(maxlen=_UNDOABLE)

    @property
    def rounds(self) -> int:
        return self._progress.rounds

    def perturb(self, place: tuple[int, int], sign: int) -> None:
        """Let the parameters show w + sign * eps * z until the next change, or restore()."""
        self.lattice.perturb(place, sign)

    def restore(self) -> None:
        """Let the parameters show w."""
        self.lattice.restore()

    def apply(self, rounds: Sequence[Round]) -> None:
        """Carry out rounds, the next ones in order, in as few passes over the weights as their snapshots allow.

        Raises:
            ValueError: another round should come next.
            WeightRangeError: the weights have grown beyond their grid.
        """
        segment: list[Round] = []
        for round_ in rounds:
            if round_.number != self.rounds + len(segment):
                raise ValueError(f"round {round_.number} came where round {self.rounds + len(segment)} is next")
            segment.append(round_)
            if self._acts_after(round_.number):
                self._apply_segment(segment)
                self._settle()
                segment = []
        self._apply_segment(segment)

    def undo(self, round_: Round) -> None:
        """Take the newest round back, exactly: 4 rounds at most, and none that a snapshot has followed."""
        assert round_.number == self.rounds - 1
        assert self._before
        assert not self._acts_after(round_.number)
        slopes, units = self._units(round_, self._progress.pace)
        self.lattice.add(-units, slopes.places)
        self._progress = self._before.pop()

    def is_snapshot(self, number: int) -> bool:
        """Whether a snapshot follows round `number`."""
        return (number + 1) % self.manifest.numerics.snapshot_every == 0

    def model_hash(self) -> bytes:
        """SHA-256 of the weights, 32 bytes."""
        return self.lattice.digest()

    def state(self) -> dict[str, Any]:
        """What the weights alone do not say."""
        return {"progress": asdict(self._progress), "lattice": self.lattice.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what state() gave, beside parameters that are loaded before or after."""
        progress = dict(state["progress"])
        self._progress = _Progress(**{**progress, "pace": Pace(**progress["pace"])})
        self._before.clear()
        self.lattice.load(state["lattice"])

    def _acts_after(self, number: int) -> bool:
        """Whether something happens to the weights between a round and the next."""
        decays = any(entry.decay for entry in self.manifest.tensors)
        return self.is_snapshot(number) and (decays or self.manifest.numerics.kept < 1)

    def _apply_segment(self, segment: Sequence[Round]) -> None:
        if not segment:
            return
        places, units = [], []
        for round_ in segment:
            before = self._progress
            slopes = slopes_of(round_, self.manifest)
            pace = next_pace(before.pace, slopes.values.tolist(), self.manifest.numerics.ema_decay)
            self._before.append(before)
            self._progress = _Progress(before.rounds + 1, before.rate_sum + round_.rate, pace)
            places.append(slopes.places)
            units.append(coefficients(slopes, round_.rate, pace, self.manifest, self._key))
        self.lattice.add(torch.cat(units, dim=1), torch.cat(places))

    def _units(self, round_: Round, pace: Pace) -> tuple[Slopes, Tensor]:
        slopes = slopes_of(round_, self.manifest)
        return slopes, coefficients(slopes, round_.rate, pace, self.manifest, self._key)

    def _settle(self) -> None:
        """What is done at a snapshot."""
        progress = self._progress
        self.lattice.decay(progress.rate_sum)
        if self.manifest.numerics.kept < 1:
            self.lattice.choose_kept()
        self._progress = _Progress(progress.rounds, 0.0, progress.pace)
        self._before.clear()

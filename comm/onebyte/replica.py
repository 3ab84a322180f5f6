"""One machine's weights as a function of the base weights and the log: the same on every machine, bit for bit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

from torch import Tensor

from thinwire.comm.onebyte.byte_code import ByteCode
from thinwire.comm.onebyte.coefficients import Progress, Slopes, coefficients
from thinwire.comm.onebyte.errors import ModelMismatchError, WeightRangeError
from thinwire.comm.onebyte.exchange import Change
from thinwire.comm.onebyte.lattice import Lattice
from thinwire.comm.onebyte.manifest import Manifest
from thinwire.comm.onebyte.rounds import Round
from thinwire.comm.onebyte.step_size import Pace
from thinwire.comm.onebyte.stream import key_of

Base: TypeAlias = Callable[[], Mapping[str, Tensor]]

_UNDOABLE = 4
_CONTRIBUTIONS_OF_A_PASS = 2048  # beside so many, reading and writing the weights takes no time


class Replica:
    """Carries out committed rounds on the weights of this machine.

    Every `snapshot_every` rounds comes a snapshot: weight decay, and which weights move (`kept` < 1), are settled there
    and hold until the next. Between them the order of contributions does not matter.

    Args:
        manifest: of the run.
        parameters: the trained tensors, in the manifest's order, with the base weights.
        base: gives the base weights again, by name; None: rebuild() cannot.
        code: another than the manifest's, to measure what the byte costs.
    Attributes:
        rounds: how many are carried out.
        newest: the last round carried out, if it is known.
        base_hash: model_hash() before the first round.
    """

    def __init__(
        self,
        manifest: Manifest,
        parameters: Sequence[Tensor],
        base: Base | None = None,
        *,
        code: ByteCode | None = None,
    ) -> None:
        self.manifest = manifest
        self._base = base
        self._key = key_of(manifest.to_bytes())
        self._code = code or ByteCode(manifest.numerics.floor_log2)
        self.lattice = Lattice(manifest, parameters, self._key)
        self._settles = manifest.numerics.kept < 1 or any(entry.decay for entry in manifest.tensors)
        self._progress = Progress()
        self._before: deque[Progress] = deque(maxlen=_UNDOABLE)
        self.newest: Round | None = None
        self.base_hash = self.model_hash()

    @property
    def rounds(self) -> int:
        return self._progress.rounds

    def perturb(self, place: tuple[int, int], sign: int) -> None:
        """Let the parameters show w + sign * eps * z until the next change, or restore()."""
        self.lattice.perturb(place, sign)

    def restore(self) -> None:
        """Let the parameters show w."""
        self.lattice.restore()

    def carry_out(self, changes: Sequence[Change]) -> None:
        """Apply rounds, those that follow one another together, and take back what others have not committed."""
        waiting: list[Round] = []
        for record, undone in changes:
            if isinstance(record, Round) and not undone:
                waiting.append(record)
            elif isinstance(record, Round):
                self.apply(waiting)
                waiting = []
                self.undo(record)
        self.apply(waiting)
        self.restore()

    def rebuild(self) -> None:
        """Go back to the base weights: no round is carried out then.

        Raises:
            ModelMismatchError: they cannot be had again, or have changed.
        """
        if self._base is None:
            raise ModelMismatchError(
                f"after {self.rounds} rounds the weights are not those of the run, and there are no base weights to "
                "make them anew; start this process again, with its base model and its log, or give base="
            )
        self.lattice.rebuild(self._base())
        self._progress = Progress()
        self._before.clear()
        self.newest = None
        if self.model_hash() != self.base_hash:
            raise ModelMismatchError(
                f"base: it gives weights with the SHA-256 {self.model_hash().hex()[:16]}..., the run began at "
                f"{self.base_hash.hex()[:16]}..."
            )

    def apply(self, rounds: Sequence[Round]) -> None:
        """Carry out rounds, the next ones in order, in as few passes over the weights as their snapshots allow.

        Raises:
            ValueError: another round should come next; nothing has changed.
            WeightRangeError: the weights would grow beyond their grid. The rounds of earlier passes are carried out
                then; `rounds` says how many. Where one round is given, nothing has changed.
        """
        for number, round_ in enumerate(rounds, self.rounds):
            if round_.number != number:
                raise ValueError(f"round {round_.number} came where round {number} is next")
        for segment in self._segments(rounds):
            self._apply_segment(segment)

    def undo(self, round_: Round) -> None:
        """Take the newest round back, exactly: 4 rounds at most, and none that a snapshot has followed."""
        assert round_.number == self.rounds - 1
        assert self._before
        assert not self._acts_after(round_.number)
        slopes = Slopes()
        slopes.take(round_, self._before[-1], self.manifest.numerics, self._code)
        self.lattice.add(-coefficients(slopes, self.manifest, self._key), slopes.places)
        self._progress = self._before.pop()
        self.newest = None

    def is_snapshot(self, number: int) -> bool:
        """Whether a snapshot follows round `number`."""
        return (number + 1) % self.manifest.numerics.snapshot_every == 0

    def model_hash(self) -> bytes:
        """SHA-256 of the weights, 32 bytes."""
        return self.lattice.digest()

    def check_untouched(self) -> None:
        """Raise a ValueError that names a parameter which somebody else has changed."""
        self.lattice.check_untouched()

    def state(self) -> dict[str, Any]:
        """What the weights alone do not say."""
        return {"progress": asdict(self._progress), "lattice": self.lattice.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what state() gave, beside parameters that are loaded before or after."""
        progress = dict(state["progress"])
        self.lattice.load(state["lattice"])
        self._progress = Progress(**{**progress, "pace": Pace(**progress["pace"])})
        self._before.clear()

    def _acts_after(self, number: int) -> bool:
        """Whether something happens to the weights between a round and the next."""
        return self._settles and self.is_snapshot(number)

    def _segments(self, rounds: Sequence[Round]) -> Iterator[list[Round]]:
        """Rounds that take one pass over the weights."""
        segment: list[Round] = []
        contributions = 0
        for round_ in rounds:
            segment.append(round_)
            contributions += sum(len(c.codes) for c in round_.contributions)
            if contributions >= _CONTRIBUTIONS_OF_A_PASS or self._acts_after(round_.number):
                yield segment
                segment, contributions = [], 0
        if segment:
            yield segment

    def _apply_segment(self, segment: Sequence[Round]) -> None:
        slopes, progresses = Slopes(), [self._progress]
        for round_ in segment:
            progresses.append(slopes.take(round_, progresses[-1], self.manifest.numerics, self._code))
        *before, after = progresses
        settles = self._acts_after(segment[-1].number)
        if settles:
            self._check_decay(after)
        self.lattice.add(coefficients(slopes, self.manifest, self._key), slopes.places)
        self._progress = after
        self._before.extend(before)
        self.newest = segment[-1]
        if settles:
            self._settle()

    def _check_decay(self, progress: Progress) -> None:
        for entry in self.manifest.tensors:
            share = entry.decay * entry.rate_scale * progress.rate_sum
            if share >= 1:
                raise WeightRangeError(
                    f"weight decay would take {share:.3g} times {entry.name} away at the snapshot after "
                    f"{progress.rounds} rounds; lower weight_decay, the learning rate or snapshot_every"
                )

    def _settle(self) -> None:
        """What is done at a snapshot."""
        progress = self._progress
        self.lattice.decay(progress.rate_sum)
        if self.manifest.numerics.kept < 1:
            self.lattice.choose_kept()
        self._progress = Progress(progress.rounds, 0.0, progress.pace)
        self._before.clear()

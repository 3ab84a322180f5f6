"""What the optimizer's thread does between two evaluations: carry out changes, prove hashes, take a seat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from thinwire.comm.onebyte.exchange import Change
from thinwire.comm.onebyte.membership.core import Core
from thinwire.comm.onebyte.membership.errors import ModelMismatchError
from thinwire.comm.onebyte.membership.work import Seat
from thinwire.comm.onebyte.rounds import Snapshot


class Model(Protocol):
    """The weights of this machine. All is called from the thread that calls begin() and commit()."""

    @property
    def rounds(self) -> int:
        """How many rounds the weights have taken up."""
        ...

    def carry_out(self, changes: Sequence[Change]) -> None:
        """Apply records, or undo the newest one exactly, in this order."""
        ...

    def model_hash(self) -> bytes:
        """SHA-256 of the weights, 32 bytes."""
        ...

    def rebuild(self) -> None:
        """Go back to the weights of the base model, with no round taken up. Raises ModelMismatchError if it cannot."""
        ...


class Steps:
    """Brings the model up to date with the ledger and proves its hash.

    Args:
        lock: held by whoever touches the core; not held here while the model works.
        clock: seconds.
    """

    def __init__(
        self, core: Core, model: Model, lock: AbstractContextManager[object], clock: Callable[[], float]
    ) -> None:
        self._core = core
        self._model = model
        self._lock = lock
        self._clock = clock
        self._is_base_checked = model.rounds > 0
        self._failed_at = -1  # snapshot at which the weights differed, and were made anew

    def next(self) -> Seat | None:
        """Do what there is to do; then the seat to take, if there is one now.

        Raises:
            ModelMismatchError: the weights are not the run's, even after they were made anew.
        """
        core, model = self._core, self._model
        if not self._is_base_checked:
            self._check_base()
        while True:
            with self._lock:
                rebuild = core.ledger.must_rebuild
                changes = core.ledger.take_changes()
                due = core.work.hash_due
                seat = core.seat()
            if rebuild:
                self._rebuild()
            elif changes:
                self._carry_out(changes)
            elif due:
                model_hash = model.model_hash()
                with self._lock:
                    core.report_hash(due, model_hash, self._clock())
            else:
                return seat

    def changes_for_commit(self) -> list[Change]:
        """What commit() shall return: changes up to the next snapshot, whose hash next() will compare. Lock held."""
        ledger = self._core.ledger
        changes = ledger.take_changes()
        for number, change in enumerate(changes):
            if isinstance(change.record, Snapshot):
                ledger.put_back(changes[number:])
                return changes[:number]
        return changes

    def _check_base(self) -> None:
        found = self._model.model_hash()
        if found != self._core.place.me.base_hash:
            raise ModelMismatchError(
                f"the base model's weights have the SHA-256 {found.hex()}, but the run's manifest says "
                f"{self._core.place.me.base_hash.hex()}: start from the model that the run started from"
            )
        self._is_base_checked = True
        with self._lock:
            self._core.prove(0, found)

    def _carry_out(self, changes: list[Change]) -> None:
        """Carry out; after the newest snapshot among them compare hashes. One pass on each side of it is enough."""
        last = max((n for n, c in enumerate(changes) if isinstance(c.record, Snapshot) and not c.undone), default=None)
        if last is None or any(change.undone for change in changes[last:]):
            self._model.carry_out(changes)
            return
        self._model.carry_out(changes[: last + 1])
        snapshot = changes[last].record
        assert isinstance(snapshot, Snapshot)
        found = self._model.model_hash()
        if found == snapshot.model_hash:
            with self._lock:
                self._core.prove(snapshot.rounds, found)
            self._model.carry_out(changes[last + 1 :])
            return
        if self._failed_at >= 0:
            raise ModelMismatchError(
                f"after {snapshot.rounds} rounds the weights have the SHA-256 {found.hex()}, a quorum of the machines "
                f"has {snapshot.model_hash.hex()}, and making them anew from base and log did not help: this machine's "
                "memory, its thinwire or its base model is at fault"
            )
        self._failed_at = snapshot.rounds
        with self._lock:
            self._core.ledger.must_rebuild = True

    def _rebuild(self) -> None:
        self._model.rebuild()
        with self._lock:
            self._core.ledger.start_over()

"""One machine of a decentralized run: schedule, algorithm and merge, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from thinwire.comm.errors import OwnWeightsError
from thinwire.comm.finite import are_finite
from thinwire.comm.gossip.algorithm import Algorithm, HasCompanion, KeepsStep
from thinwire.comm.gossip.barrier import barrier
from thinwire.comm.gossip.begin import tell_newcomers
from thinwire.comm.gossip.join import Entry, answer_joins, enter
from thinwire.comm.gossip.merge import Merged, average_all, average_bytes
from thinwire.comm.gossip.message import MEETING_STREAM, Kind, Message
from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.gossip.probes import Probes
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Schedule

# Streams of average_all(): merges of the schedule, averages that are asked for, and what is averaged besides weights.
_SCHEDULED, _ASKED, _BESIDES = 0, 1, 3  # 2 is SlowMo's


class Agent:
    """Runs an algorithm by a schedule. A simulation drives its scripts as a trainer's hooks do.

    Machines that go in rounds meet, to merge or for a cut, after the same step. Where each keeps its own pace, the
    first to reach such a step calls the others, who come after the step that they are at: so a straggler delays nobody
    by more than one of its steps, and when the first has taken its last step, all end.

    Args:
        steps: optimizer steps of the whole run; None: it has no end.
        in_rounds: whether all machines go through the same rounds.
        deadline_s: how long a merge or a cut waits for the last machine.
        probes: measure the consensus distance every probe_every steps; None: nobody does.
        joinable: whether machines may enter while the run is under way.
    Attributes: step, optimizer steps taken. ended, whether the run is over for all; then before_step() and
        after_step() do nothing more. stopped, whether that is because one was asked to stop. cut_every: steps between
        two cuts, 0 = none; cut_due, whether it is time for one. before_merge, called before a scheduled merge;
        after_merge, a script after it, which gets its number. is_merged, whether this machine took part in a merge
        after its last step. predicted_bytes, payload bytes that it sent in the last step, by machine.
    """

    def __init__(
        self,
        replica: Replica,
        port: Port,
        algorithm: Algorithm,
        schedule: Schedule,
        *,
        steps: int | None = None,
        in_rounds: bool = True,
        deadline_s: float = 600.0,
        probes: Probes | None = None,
        probe_every: int = 1,
        joinable: bool = True,
    ) -> None:
        self.replica = replica
        self.port = port
        self.algorithm = algorithm
        self.schedule = schedule
        self.in_rounds = in_rounds
        self.step = 0
        self.ended = False
        self.stopped = False
        self.cut_every = 0
        self.cut_due = False
        self.before_merge: Callable[[], None] = lambda: None
        self.after_merge: Callable[[Agent, int], Script[None]] = _nothing
        self.is_merged = False
        self.predicted_bytes: dict[int, int] = {}
        self._steps = steps
        self._deadline_s = deadline_s
        self._probes = probes
        self._probe_every = probe_every
        self._joinable = joinable
        self._last_meeting = 0  # steps after which the last one was due
        self._number = 0  # of the last cut or average: they rise, and are the same on all machines
        self._stop_at: int | None = None
        self._merges = 0
        self._left_out = 0
        self._absent = 0

    def before_step(self) -> Script[None]:
        """Between backward and the optimizer's step.

        Raises:
            OwnWeightsError: as after_step(), of algorithms that exchange here. The step counts as taken.
        """
        if not self.ended:
            try:
                yield from self.algorithm.before_step(self.schedule.turn(self.step))
            except OwnWeightsError:
                self.step += 1  # the others have gone through this round
                raise

    def after_step(self) -> Script[None]:
        """After the optimizer's step.

        Raises:
            OwnWeightsError: this machine's weights are not finite. Nobody has been sent them.
        """
        self.cut_due = self.is_merged = False
        self.predicted_bytes = {}
        if self.ended:
            self.step += 1
            return
        turn = self.schedule.turn(self.step)
        if not self.in_rounds:
            self._refuse_non_finite()  # in rounds the mixer does, which also tells the neighbours
        try:
            yield from self.algorithm.after_step(turn)
        except OwnWeightsError:
            self.step += 1  # the others have gone through this round
            raise
        self.predicted_bytes = dict(self.algorithm.sent_bytes(turn))
        self.step = self.algorithm.next_step if isinstance(self.algorithm, KeepsStep) else self.step + 1
        if self.in_rounds:
            yield from self._meet(self.step)
            yield from self._stop_together()
        else:
            yield from self._meet_when_called()
        self._probe()
        tell_newcomers(self.port, self.step)
        yield from answer_joins(
            self.port,
            self.replica,
            self.algorithm,
            step=self.step,
            meeting=self._last_meeting,
            joinable=self._joinable,
        )

    def enter(self) -> Script[Entry]:
        """Instead of beginning at step 0: take weights and half the mass of a machine of a run under way.

        Where machines go in rounds, this one goes on at the round after the newest that it has heard of, so that nobody
        waits for it to catch up; but at a merge that comes before, at which the others wait for it.

        Raises:
            PeerLostError, ValueError: as join.enter() says.
        """
        entry = yield from enter(self.port, self.replica, self.algorithm, deadline_s=self._deadline_s)
        step = entry.step
        if self.in_rounds:
            newest = [self.port.newest(rank, kind) for rank in self._others() for kind in (Kind.VALUE, Kind.PUSH)]
            while step != self._steps and self.schedule.turn(step).round <= max(newest, default=-1):
                if self.schedule.turn(step).merge:
                    break
                step += 1
        self.go_on(step, step if self.in_rounds else entry.meeting, self.replica.weights())
        return entry

    def cut(self) -> Script[frozenset[int]]:
        """Come to a state of all machines that belongs together: nothing is on the wire. All call it.

        Returns: the machines that have come, the same set to each; without this one, if it was too late.
        """
        yield from self.algorithm.drain()
        present = yield from barrier(
            self.port,
            self._next_number(),
            deadline_s=self._deadline_s,
            asked=self.algorithm.asked,
            serve=self.algorithm.serve,
        )
        yield from self.algorithm.drain()
        return present

    def average(self) -> Script[Merged]:
        """The mean of the weights of all machines, which keep their own. All call it.

        Raises:
            OwnWeightsError: this machine's weights are not finite; the others have their mean without them.
        """
        return (yield from self._average(self._next_number(), _ASKED))

    def merge(self) -> Script[None]:
        """All machines take the mean of their weights, beside what the schedule says. All call it.

        Raises:
            OwnWeightsError: this machine's weights are not finite; the others have merged without them.
        """
        yield from self._merge(self._next_number(), _ASKED)

    def average_of(self, value: Tensor, at: int) -> Script[Merged]:
        """The mean of another vector, after the merge of this number. All call it."""
        return (yield from self._average_all(value, at, _BESIDES))

    def stop(self) -> None:
        """Ask all machines to end, without a final merge: after this machine's next step, or soon after it."""
        self.stopped = True

    def stopped_by(self) -> tuple[int, ...]:
        """Machines that have told the others to stop; this one only if nobody else has."""
        return tuple(rank for rank in self._others() if self._has_told(rank, Kind.END)) or (self.port.rank,)

    def metrics(self) -> dict[str, float]:
        """Those of the algorithm; `merges`, and `left_out` of so many; `lost` machines; `absent`, those not finite."""
        own = self.algorithm.metrics()
        return {
            **own,
            **(self._probes.metrics() if self._probes else {}),
            "merges": float(self._merges),
            "left_out": float(self._left_out),
            "lost": float(len(self.port.lost())),
            "absent": own.get("absent", 0.0) + self._absent,
        }

    def state_dict(self) -> dict[str, Any]:
        """After cut(): step, weights, and what the algorithm remembers."""
        return {
            "step": self.step,
            "meeting": self._last_meeting,
            "merges": self._merges,
            "weights": self.replica.weights().cpu(),
            "mass": self.algorithm.mass,
            "algorithm": self.algorithm.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave on this machine."""
        self.go_on(int(state["step"]), int(state["meeting"]), state["weights"])
        self._merges = int(state["merges"])
        self.algorithm.load_state_dict(state["algorithm"])

    def go_on(self, step: int, meeting: int, weights: Tensor) -> None:
        """Stand after so many steps, the last meeting having been due after `meeting`, with these weights."""
        self.step = step
        self.replica.set_weights(weights.to(device=self.replica.device, dtype=self.replica.dtype))
        self._last_meeting = meeting
        self.ended = self._steps is not None and max(step, meeting) >= self._steps

    def _meet(self, at: int) -> Script[None]:
        """What is due after `at` steps."""
        self._last_meeting = at
        if self.schedule.turn(at - 1).merge:
            yield from self._merge(at << 16, _SCHEDULED)
        self.ended = at == self._steps
        self.cut_due = bool(self.cut_every) and at % self.cut_every == 0 and not self.ended

    def _probe(self) -> None:
        if self._probes is None or self.port.size == 1:
            return
        if self.step % self._probe_every == 0:
            weights = self.replica.weights()
            if are_finite([weights]):
                self._count(self._probes.sent_bytes())
                self._probes.publish(self.step, weights)
        self._probes.collect()

    def _merge(self, number: int, stream: int) -> Script[None]:
        self.before_merge()
        merged = yield from self._average(number, stream)
        self._merges += 1
        self._count(average_bytes(self.replica.numel, self.replica.dtype.itemsize, self.port.rank, merged.members))
        if self.port.rank in merged.members:
            self.replica.set_weights(merged.value)
            self.algorithm.merged()
            self.is_merged = True
            yield from self.after_merge(self, number)
        else:
            self._left_out += 1

    def _average(self, number: int, stream: int) -> Script[Merged]:
        yield from self.cut()  # what came after the vector is handed over would be in no mean
        algorithm = self.algorithm
        value = algorithm.averaged() if isinstance(algorithm, HasCompanion) else self.replica.weights()
        return (yield from self._average_all(value, number, stream))

    def _average_all(self, value: Tensor, number: int, stream: int) -> Script[Merged]:
        # Nobody who takes part asks for anything meanwhile, and who was too late gets answers afterwards.
        merged = yield from average_all(
            self.port, value, self.algorithm.mass, number=number, deadline_s=self._deadline_s, stream=stream
        )
        if self.port.rank in merged.nonfinite:
            raise OwnWeightsError(self.port.rank)
        self._absent += len(merged.nonfinite)
        return merged

    def _count(self, sent: Mapping[int, int]) -> None:
        for rank, count in sent.items():
            self.predicted_bytes[rank] = self.predicted_bytes.get(rank, 0) + count

    def _next_number(self) -> int:
        due = self.step if self.in_rounds else self._last_meeting
        self._number = max(self._number, due << 16) + 1
        return self._number

    def _meet_when_called(self) -> Script[None]:
        """Where each machine keeps its own pace: meet where it is time here, or where another says so."""
        if self.stopped or self._told(Kind.END):
            if self.stopped:
                self._tell_all(Message(Kind.END, self.step))
            self.stopped = self.ended = True
            return
        called = max((self.port.newest(rank, Kind.BARRIER, MEETING_STREAM) for rank in self._others()), default=0)
        if isinstance(self.algorithm, KeepsStep) and self._steps is not None and self.step < self._steps:
            called = min(called, self._steps - 1)
        while not self.ended and (at := self._meeting_by(max(called, self.step))) is not None:
            if called < at:
                self._tell_all(Message(Kind.BARRIER, at, stream=MEETING_STREAM))
            yield from self._meet(at)

    def _meeting_by(self, step: int) -> int | None:
        """Of the meetings that are due by then and have not been, the last: others no longer come to earlier ones."""
        for at in range(step, self._last_meeting, -1):
            if self.schedule.turn(at - 1).merge or at == self._steps or (self.cut_every and at % self.cut_every == 0):
                return at
        return None

    def _stop_together(self) -> Script[None]:
        """Where machines go in rounds and one is asked to stop: all go on to the last step that one of them names.

        Each names the step so many ahead as there are machines, which is further than any can be ahead of it: so no
        machine waits here for the word of one that waits for its next round.
        """
        if self._stop_at is None and not self.ended and (self.stopped or self._told(Kind.END)):
            self._stop_at = self.step + self.port.size
            self._tell_all(Message(Kind.END, self._stop_at))
        if self._stop_at is None or self.ended:
            return
        self._stop_at = max([self._stop_at, *(self.port.newest(rank, Kind.END) for rank in self._others())])
        if self.step >= self._stop_at:
            until = self.port.now() + self._deadline_s
            yield Wait(lambda: all(self._has_told(rank, Kind.END) for rank in self._others()), until)
            self._stop_at = max([self._stop_at, *(self.port.newest(rank, Kind.END) for rank in self._others())])
        if self.step >= self._stop_at:
            self.stopped = self.ended = True

    def _others(self) -> list[int]:
        return [rank for rank in range(self.port.size) if rank != self.port.rank]

    def _told(self, kind: Kind) -> bool:
        return any(self.port.newest(rank, kind) >= 0 for rank in self._others())

    def _has_told(self, rank: int, kind: Kind) -> bool:
        return self.port.newest(rank, kind) >= 0 or rank in self.port.lost()

    def _tell_all(self, message: Message) -> None:
        for rank in self._others():
            self.port.send(rank, message)

    def _refuse_non_finite(self) -> None:
        if not are_finite([self.replica.weights()]):
            raise OwnWeightsError(self.port.rank)


def _nothing(agent: Agent, at: int) -> Script[None]:
    return
    yield

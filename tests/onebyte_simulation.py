"""A run of machines that come and go, simulated: a network that loses, a clock that jumps, disks that may be lost."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import random
import secrets
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from thinwire.comm.onebyte.exchange import Change
from thinwire.comm.onebyte.log import Log
from thinwire.comm.onebyte.membership.core import Core, Outgoing
from thinwire.comm.onebyte.membership.errors import ModelMismatchError
from thinwire.comm.onebyte.membership.frame import parse_frame
from thinwire.comm.onebyte.membership.ledger import Ledger
from thinwire.comm.onebyte.membership.place import Me
from thinwire.comm.onebyte.membership.promise import Promise
from thinwire.comm.onebyte.membership.settings import MembershipSettings
from thinwire.comm.onebyte.membership.steps import Steps
from thinwire.comm.onebyte.membership.work import Seat
from thinwire.comm.onebyte.rounds import Record, Round

MANIFEST = b"a run of numbers"
RUN = hashlib.sha256(MANIFEST).digest()[:8]
SNAPSHOT_EVERY = 7


_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())


def memory_log() -> Log:
    """A log in memory where the system has such files, under no name."""
    path = _MEMORY / f"thinwire-{secrets.token_hex(8)}.log"
    log = Log.create(path, MANIFEST)
    path.unlink()
    return log


class Numbers:
    """Weights that are the list of what was done to them: nothing can be lost or done twice without being seen."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.fault = b""

    @property
    def rounds(self) -> int:
        return sum(isinstance(record, Round) for record in self.records)

    def carry_out(self, changes: Sequence[Change]) -> None:
        for record, undone in changes:
            if undone:
                assert self.records.pop() == record
                assert not (isinstance(record, Round) and (record.number + 1) % SNAPSHOT_EVERY == 0)
            else:
                assert not isinstance(record, Round) or record.number == self.rounds
                self.records.append(record)

    def model_hash(self) -> bytes:
        rounds = [record for record in self.records if isinstance(record, Round)]
        return hashlib.sha256(repr(rounds).encode() + self.fault).digest()

    def rebuild(self) -> None:
        self.records, self.fault = [], b""


BASE_HASH = Numbers().model_hash()


@dataclass
class Disk:
    log: Log = field(default_factory=memory_log)
    promise: Promise = field(default_factory=Promise)

    def load(self) -> Promise:
        return self.promise

    def save(self, promise: Promise) -> None:
        self.promise = promise


class Machine:
    """One simulated machine. work_s: how long it evaluates a round."""

    def __init__(self, run: Simulation, number: int, settings: MembershipSettings, work_s: float) -> None:
        self.run, self.address, self.settings, self.work_s = run, f"host{number}:1", settings, work_s
        self.name = f"m{number}"
        self.disk = Disk()
        self.alive = self.stopped = False
        self.life = 0
        self.missed: list[Callable[[], None]] = []
        self.model = Numbers()
        self.core: Core

    def boot(self, fault: bytes = b"") -> None:
        self.alive, self.stopped, self.life = True, False, self.life + 1
        self.missed = []
        if self.life > 1:  # as if read from the file again
            old, self.disk.log = self.disk.log, memory_log()
            self.disk.log.extend_raw(old.raw(0))
            old.close()
        self.failure: Exception | None = None
        self.model = Numbers()
        self.model.fault = fault
        self.ledger = Ledger(self.disk.log, SNAPSHOT_EVERY, sync=False)
        me = Me(self.name, self.address, RUN, BASE_HASH)
        chance = random.Random(self.run.chance.random())
        self.core = Core(me, self.ledger, self.disk, self.settings, chance=chance, now=self.run.now)
        self.steps = Steps(self.core, self.model, contextlib.nullcontext(), lambda: self.run.now)
        self.evaluating: Seat | None = None
        self.waiting: Seat | None = None
        self.done(self.life)
        self.tick(self.life)

    def tick(self, life: int) -> None:
        if life == self.life and self.alive:
            self.do(lambda: self.core.tick(self.run.now))
            self.run.after(self.settings.heartbeat_s / 3, lambda: self.tick(life))

    def do(self, work: Callable[[], None]) -> None:
        """Let something happen on this machine: now, or when it goes on."""
        if not self.alive:
            return
        if self.stopped:
            self.missed.append(work)
            return
        work()
        self.follow_up()

    def follow_up(self) -> None:
        self.run.check(self)
        if self.waiting and not self.core.work.is_open(self.waiting):
            self.model.carry_out(self.steps.changes_for_commit())
            self.waiting = None
        if not self.evaluating and not self.waiting and not self.core.failure:
            try:
                self.evaluating = self.steps.next()
            except ModelMismatchError as error:
                self.alive, self.failure = False, error
                return
            if self.evaluating:
                life = self.life
                self.run.after(self.work_s * self.run.chance.uniform(0.7, 1.3), lambda: self.done(life))
        outbox, self.core.outbox = self.core.outbox, []
        for address, message in outbox:
            self.run.carry(self.address, address, message)
        self.run.check(self)

    def done(self, life: int) -> None:
        def finish() -> None:
            seat, self.evaluating = self.evaluating, None
            if life == self.life and seat:
                turn = seat.turn
                codes = hashlib.shake_128(repr((turn, seat.base)).encode()).digest(turn.samples)
                rate = struct.unpack("<f", struct.pack("<f", 1 / (turn.round + 2)))[0]
                self.core.contribute(seat, codes, rate, self.run.now)
                self.waiting = seat

        if life == self.life:
            self.do(finish)

    def kill(self, *, lose_disk: bool = False) -> None:
        self.alive = False
        if lose_disk:
            self.disk = Disk()
            self.life = 0
            self.run.lives += 1000
            self.life = self.run.lives

    def go_on(self) -> None:
        self.stopped = False
        missed, self.missed = self.missed, []
        for work in missed:
            self.do(work)


class Simulation:
    """Machines and the network between them.

    loss, twice: probability that a message is lost, or arrives twice. Delays vary, so that messages overtake.
    """

    def __init__(self, seed: int, **settings: Any) -> None:
        self.chance = random.Random(seed)
        self.now = 0.0
        self.lives = 0
        self.loss = self.twice = 0.0
        self.delay_s = (0.01, 0.15)
        self.machines: list[Machine] = []
        self.group: dict[str, int] = {}
        self.sent: list[tuple[str, str, Outgoing]] | None = None
        self._settings: dict[str, Any] = {
            "heartbeat_s": 0.5, "suspicion_s": 2.0, "deadline_s": 5.0, "remove_after": 6, **settings
        }  # fmt: skip
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._committed: list[bytes] = []
        self._led: dict[int, list[bytes]] = {}

    def add(self, work_s: float = 0.3, *, contacts: Sequence[int] = (0,), **settings: Any) -> Machine:
        number = len(self.machines)
        addresses = () if number == 0 else tuple(f"host{contact}:1" for contact in contacts)
        made = MembershipSettings(**{"contacts": addresses, **self._settings, **settings})
        machine = Machine(self, number, made, work_s)
        self.machines.append(machine)
        machine.boot()
        return machine

    def after(self, delay_s: float, work: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay_s, self._count, work))

    def carry(self, sender: str, address: str, message: Outgoing) -> None:
        if self.sent is not None:
            self.sent.append((sender, address, message))
        for _ in range(2 if self.chance.random() < self.twice else 1):
            if self.chance.random() >= self.loss:
                slow = 10 if self.chance.random() < self.loss else 1
                self.after(self.chance.uniform(*self.delay_s) * slow, lambda: self.arrive(sender, address, message))

    def arrive(self, sender: str, address: str, message: Outgoing) -> None:
        if self.group.get(sender, 0) != self.group.get(address, 0):
            return
        target = next((m for m in self.machines if m.address == address), None)
        if target is None or not target.alive:
            return
        parsed = parse_frame(message, RUN) if isinstance(message, bytes) else message
        target.do(lambda: target.core.receive(sender, parsed, self.now))

    def tell_lost(self, address: str) -> None:
        """The connections to a machine break."""
        for machine in self.machines:
            if machine.address != address:
                machine.do(lambda machine=machine: machine.core.lost(address, self.now))

    def run_until(self, goal: Callable[[], bool], limit_s: float) -> None:
        """Raises AssertionError, with a picture, if the goal is not reached within so many simulated seconds."""
        end = self.now + limit_s
        while not goal():
            self.step()
            assert self.now <= end, f"not within {limit_s} s: {self.describe()}"

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self._events and self._events[0][0] <= end:
            self.step()
        self.now = end

    def step(self) -> None:
        self.now, _, work = heapq.heappop(self._events)
        work()

    def check(self, machine: Machine) -> None:
        """What is committed is the same everywhere, for ever; and logs that follow one leader are parts of its log."""
        ledger = machine.ledger
        for length in range(len(self._committed), ledger.committed):
            self._committed.append(ledger.log.chain(length + 1))
        if ledger.committed:
            chain = ledger.log.chain(ledger.committed)
            assert chain == self._committed[ledger.committed - 1], f"two histories: {self.describe()}"
        length, term = len(ledger.log), machine.core.place.promise.log_term
        if machine.core.leads:
            led = self._led.setdefault(term, [])
            led += [ledger.log.chain(n) for n in range(len(led), length + 1)]
        if term in self._led:
            assert length < len(self._led[term]), f"longer than its leader's: {self.describe()}"
            assert ledger.log.chain(length) == self._led[term][length], f"not its leader's: {self.describe()}"

    def check_models(self) -> None:
        """Every machine's weights have taken up exactly the log, once, as far as it was handed out."""
        for machine in self.machines:
            if machine.alive and not machine.ledger.must_rebuild:
                machine.model.carry_out(machine.ledger.take_changes())
                expected = list(machine.ledger.log)
                if not machine.ledger.all_taken:
                    expected.pop()
                assert machine.model.records == expected

    @property
    def rounds(self) -> int:
        return max((m.ledger.log.rounds for m in self.machines if m.alive), default=0)

    def describe(self) -> str:
        return "; ".join(
            f"{m.name} {'dead' if not m.alive else 'stopped' if m.stopped else 'up'} {m.disk.promise} "
            f"len {len(m.ledger.log)} committed {m.ledger.committed} rounds {m.ledger.log.rounds} "
            f"{'LEADS' if m.core.leads else m.core.leader_address} roster {[r.slot for r in m.ledger.roster.members]} "
            f"{m.core.failure or ''}"
            for m in self.machines
        )


def together(machines: int, seed: int = 0, **settings: object) -> Simulation:
    """Machines that have all committed a few rounds."""
    run = Simulation(seed, wait_for=machines, **settings)
    for _ in range(machines):
        run.add(samples=3)
    run.run_until(lambda: all(m.ledger.log.rounds > 3 for m in run.machines), 60)
    return run


def leader(run: Simulation) -> Machine:
    return next(m for m in run.machines if m.alive and not m.stopped and m.core.leads)


def everyone_goes_on(run: Simulation, rounds: int = 3, limit_s: float = 100.0) -> None:
    """All that are up commit some more rounds, with all of them in the roster, and agree on all."""
    up = [m for m in run.machines if m.alive and not m.stopped]
    goal = max(m.ledger.log.rounds for m in up) + rounds
    run.run_until(lambda: all(m.ledger.log.rounds >= goal and m.core.place.member for m in up), limit_s)
    run.check_models()


def records(machine: Machine, kind: type) -> list:
    return [record for record in machine.ledger.log if isinstance(record, kind)]

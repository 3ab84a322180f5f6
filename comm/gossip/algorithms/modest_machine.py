"""One machine of MoDeST: trains when it is drawn, averages when it is drawn for that, and answers in between.

For those who drive it: after_step() returns when this machine is to compute its next step, which is `next_step` of the
run; it may wait long for that. It also returns when other machines call a meeting (a cut, the end), and goes on waiting
in the next after_step(). What is under way at a cut is dropped and done again, alike whether one goes on or resumes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thinwire.comm.gossip.algorithm import Parts
from thinwire.comm.gossip.algorithms.modest_roll import PING, PONG, RollCall
from thinwire.comm.gossip.algorithms.modest_view import View, decode_view, order_of, view_bytes
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.message import MEETING_STREAM, Kind, Message, no_payload
from thinwire.comm.gossip.port import Script, Wait
from thinwire.comm.gossip.strands import Strands
from thinwire.comm.gossip.turn import Turn
from thinwire.comm.wire import PayloadError
from thinwire.kernels.weighted_sum import weighted_sum

if TYPE_CHECKING:
    from thinwire.comm.gossip.algorithms.modest import ModestSettings

MODEL, AVERAGE, USED, LEAVE = range(PONG + 1, 6)
"""Streams of Kind.SAMPLE."""
TRAIN, FINAL = 1, 2
"""Flags of AVERAGE: the receiver is in the sample; no round follows."""


@dataclass(frozen=True, eq=False)
class _Given:
    """A model to go on from."""

    round: int
    flags: int
    model: Tensor  # its payload


class ModestMachine:
    """Algorithm of MoDeST. Attributes: mass, 1; next_step, of the run, that this machine is to compute."""

    mass = 1.0

    def __init__(self, parts: Parts, settings: ModestSettings, inactive_rounds: int) -> None:
        self._replica = parts.replica
        self._port = parts.port
        self._seed = parts.seed
        self._settings = settings
        self._steps = parts.steps
        self._inactive_rounds = inactive_rounds
        self._codec = Plain()
        self._strands = Strands()
        self._view = View(parts.port.size)
        self._roll = RollCall(
            parts.port, self._view, seed=parts.seed, inactive_rounds=inactive_rounds, ping_s=settings.ping_s
        )
        self._rank = parts.port.rank
        self.next_step = 0
        self._entered = False
        self._round = 0  # of the model that this machine has
        self._known = 0  # the newest round that it has heard of
        self._local: int | None = None  # steps taken in the round; None: it does not train
        self._trained: Tensor | None = None  # payload of what it trained, until somebody has used it
        self._given: _Given | None = None
        self._called = 0  # the last meeting that it has come to
        self._heard_s = 0.0

        self._models: dict[int, dict[int, Tensor]] = {}  # to average, by round and sender
        self._used: set[int] = set()  # rounds in which somebody has used what this machine trained
        self._forwarding = -1  # the round whose model is being forwarded
        self._counts = {"trained": 0, "averaged": 0, "resent": 0, "rescued": 0}

    def before_step(self, turn: Turn) -> Script[None]:
        """Nothing."""
        return
        yield

    def after_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says. It returns when there is a step to compute, or a meeting to come to."""
        if not self._entered:
            self._enter(turn)
        self._tend()
        if self._local is not None and self._given is None:
            self._local += 1
            self.next_step += 1
            if self._local < self._steps_of(self._round):
                return
            self._end_training()
        self._begin_forwarding()
        yield from self._wait_for_turn()

    def asked(self) -> bool:
        """Whether there is mail."""
        return any(self._port.waiting(Kind.SAMPLE, stream) for stream in range(LEAVE + 1))

    def serve(self) -> None:
        """Read it, and do what can be done without waiting."""
        self._tend()

    def drain(self) -> Script[None]:
        """Drop what is under way. What this machine has trained stays, and is forwarded again."""
        self._tend()
        self._forget()
        return
        yield

    def sent_bytes(self, turn: Turn) -> dict[int, int]:
        """None that is known in advance: who answers decides."""
        return {}

    def metrics(self) -> dict[str, float]:
        """`mass`; `round`, the newest known; `members`; rounds `trained`, `averaged`, `resent` and `rescued` here."""
        members = len(self._view.members(self._known, self._inactive_rounds))
        counts = {name: float(count) for name, count in self._counts.items()}
        return {"mass": 1.0, "round": float(self._known), "members": float(members), **counts}

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        given = self._given
        return {
            "entered": self._entered,
            "next_step": self.next_step,
            "round": self._round,
            "known": self._known,
            "local": -1 if self._local is None else self._local,
            "trained": no_payload() if self._trained is None else self._trained,
            "given": {} if given is None else {"round": given.round, "flags": given.flags, "model": given.model},
            "active": torch.from_numpy(self._view.active.copy()),
            "changes": torch.from_numpy(self._view.changes.astype(np.int64)),
            "counts": dict(self._counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave."""
        self._forget()
        self._entered = bool(state["entered"])
        self.next_step = int(state["next_step"])
        self._round, self._known = int(state["round"]), int(state["known"])
        self._local = int(state["local"]) if int(state["local"]) >= 0 else None
        self._trained = state["trained"] if len(state["trained"]) else None
        given = state["given"]
        self._given = _Given(int(given["round"]), int(given["flags"]), given["model"]) if given else None
        self._view.active = state["active"].numpy().astype(np.int64)
        self._view.changes = state["changes"].numpy().astype(np.uint32)
        self._counts.update({name: int(count) for name, count in state["counts"].items()})

    def merged(self) -> None:
        """What this machine has trained is the average now."""
        if self._trained is not None:
            self._trained = self._codec.encode(self._round, self._replica.weights())[0]

    def hold(self, mass: float) -> None:
        """As SharesMass says: whoever enters is given weights. Averages here are of those who train, not by mass."""

    def leave(self) -> None:
        """Tell 10 s others, drawn by the hash, that this machine goes: it is drawn no more."""
        self._view.leave(self._rank)
        others = order_of(self._seed ^ 1, self._rank, set(range(self._port.size)) - {self._rank})
        for rank in others[: 10 * self._settings.sample]:
            self._send(rank, LEAVE, self._known, payload=self._view.encode())

    def _enter(self, turn: Turn) -> None:
        """The first round begins without messages: all have the same weights and know of all machines.

        A machine that enters a run under way waits for its turn; others see that it has begun anew.
        """
        self._entered = True
        self._heard_s = self._port.now()
        self._round = self._known = turn.step // self._settings.local_steps
        self.next_step = turn.step
        if turn.step == 0 and self._rank in self._roll.order(0)[: self._settings.sample]:
            self._local = 0

    def _wait_for_turn(self) -> Script[None]:
        stall_s = 4 * self._settings.aggregate_s
        while True:
            self._tend()
            if self._given is not None:
                self._take(self._given)
                return
            if self._is_called():
                return
            if self._port.now() >= self._heard_s + stall_s:
                if self._steps is not None and self._newest_call() >= self._steps:
                    self.next_step = self._steps  # the run is over, and whoever had its result is gone
                    return
                self._heard_s = self._port.now()
                self._strands.add(self._rescue())
                continue
            until = min(self._strands.until, self._heard_s + stall_s)
            yield Wait(lambda: self.asked() or self._strands.is_ready() or self._has_call(), until)

    def _take(self, given: _Given) -> None:
        like = self._replica.weights()
        self._replica.set_weights(self._codec.decode(self._rank, given.round, given.model, like))
        self._given = self._trained = None
        self._round = given.round
        self.next_step = given.round * self._settings.local_steps
        if given.flags & FINAL and self._steps is not None:
            self.next_step = self._steps
        self._local = 0 if given.flags & TRAIN else None
        self._view.saw(self._rank, given.round)

    def _end_training(self) -> None:
        self._local = None
        self._trained = self._codec.encode(self._round, self._replica.weights())[0]
        self._counts["trained"] += 1

    def _begin_forwarding(self) -> None:
        if self._trained is not None and self._forwarding != self._round:
            self._forwarding = self._round
            self._strands.add(self._forward(self._round + 1))

    def _forward(self, round: int) -> Script[None]:
        """Give the trained model to those who average for `round`, until one has used it."""
        tried: set[int] = set()
        while self._trained is not None and not self._is_used(round):
            found = yield from self._roll.draw(round, self._settings.aggregators, tried)
            for position, rank in enumerate(found):
                if self._trained is not None:
                    self._hand(rank, round, position, self._trained)
            self._counts["resent"] += bool(tried)
            tried |= set(found)
            until = self._port.now() + 2 * self._settings.aggregate_s
            yield Wait(lambda: self._is_used(round), until)
        if self._is_used(round):
            self._trained = None

    def _hand(self, rank: int, round: int, position: int, model: Tensor) -> None:
        if rank == self._rank:
            self._collect(rank, round, position, model)
        else:
            self._send(rank, MODEL, round, position, model)

    def _collect(self, source: int, round: int, position: int, model: Tensor) -> None:
        if round <= self._known and round not in self._models:
            self._tell_used(source, round)
            return
        if round not in self._models:
            self._models[round] = {}
            self._strands.add(self._average(round, first=position == 0))
        self._models[round][source] = model

    def _average(self, round: int, *, first: bool) -> Script[None]:
        """Average what a sample has trained, and give it to the next one."""
        settings, models = self._settings, self._models[round]
        enough = max(1, math.floor(settings.sample * settings.success))
        for least in (min(3, enough), 1):
            yield Wait(lambda: len(models) >= enough, self._port.now() + settings.aggregate_s)
            if len(models) >= least:
                break
        final = self._steps is not None and round * settings.local_steps >= self._steps
        if final and not first:  # so that all end with the same weights
            yield Wait(lambda: self._known >= round, self._port.now() + settings.aggregate_s)
            if self._known >= round:
                return
        sample = yield from self._roll.draw(round, settings.sample, set())
        like = self._replica.weights()
        vectors = [self._codec.decode(rank, round, models[rank], like) for rank in sorted(models)]
        mean = weighted_sum(vectors, [1.0] * len(vectors)).div_(len(vectors))
        self._counts["averaged"] += 1
        self._give(round, self._codec.encode(round, mean)[0], sample, final=final)
        for rank in sorted(models):
            self._tell_used(rank, round)
        for old in [old for old in self._models if old <= round]:
            del self._models[old]

    def _give(self, round: int, model: Tensor, sample: list[int], *, final: bool) -> None:
        self._hear_of(round)
        for rank in sample:
            self._view.saw(rank, round)
        payload = torch.cat([self._view.encode(), model])
        lost = self._port.lost()
        for rank in [r for r in range(self._port.size) if r not in lost] if final else sample:
            flags = FINAL if final else TRAIN
            if rank == self._rank:
                self._be_given(_Given(round, flags, model))
            else:
                self._send(rank, AVERAGE, round, flags, payload)

    def _be_given(self, given: _Given) -> None:
        """The newest counts; of the same round the first."""
        self._hear_of(given.round)
        if given.round > (self._round if self._given is None else self._given.round):
            self._given = given

    def _rescue(self) -> Script[None]:
        """Nothing has been heard for long: if nobody trains, the machine with the newest model begins a round."""
        answers = yield from self._roll.ask_all(self._known)
        newest = max([(self._round, -self._rank), *((round, -rank) for rank, (round, _) in answers.items())])
        if any(busy for _, busy in answers.values()) or self._local is not None or newest != (self._round, -self._rank):
            return
        self._counts["rescued"] += 1
        round = self._known + 1
        model = self._trained
        if model is None:
            model = self._codec.encode(round, self._replica.weights())[0]
        final = self._steps is not None and round * self._settings.local_steps >= self._steps
        sample = yield from self._roll.draw(round, self._settings.sample, set())
        self._give(round, model, sample, final=final)

    def _tend(self) -> None:
        """Read all mail, and let every strand go on."""
        readers: list[tuple[int, Callable[[int, Message], None]]] = [
            (LEAVE, self._read_leave),
            (PING, self._read_ping),
            (PONG, self._roll.answered),
            (USED, lambda rank, message: self._used.add(message.round)),
            (MODEL, lambda rank, m: self._collect(rank, m.round, m.flags, self._checked(m.payload))),
            (AVERAGE, self._read_average),
        ]
        for stream, read in readers:
            for rank in self._port.waiting(Kind.SAMPLE, stream):
                while self._port.peek(rank, Kind.SAMPLE, stream) is not None:
                    self._heard_s = self._port.now()
                    self._roll.heard(rank)
                    read(rank, self._port.take(rank, Kind.SAMPLE, stream))
        self._strands.advance(self._port.now())

    def _read_leave(self, rank: int, message: Message) -> None:
        self._view.merge(decode_view(message.payload, self._port.size))

    def _read_ping(self, rank: int, message: Message) -> None:
        self._view.saw(rank, self._known)
        self._roll.answer(rank, message.round, of=self._round, busy=self._local is not None)

    def _read_average(self, rank: int, message: Message) -> None:
        head = view_bytes(self._port.size)
        self._view.merge(decode_view(message.payload[:head], self._port.size))
        self._be_given(_Given(message.round, message.flags, self._checked(message.payload[head:].clone())))

    def _checked(self, model: Tensor) -> Tensor:
        expected = self._codec.payload_bytes(self._replica.numel, self._replica.dtype.itemsize)
        if len(model) != expected:
            raise PayloadError(f"a model of {self._replica.numel} weights takes {expected} bytes, not {len(model)}")
        return model

    def _hear_of(self, round: int) -> None:
        self._known = max(self._known, round)
        self._roll.forget_before(self._known - 1)
        self._used = {used for used in self._used if used >= self._known - 1}

    def _tell_used(self, rank: int, round: int) -> None:
        if rank == self._rank:
            self._used.add(round)
        else:
            self._send(rank, USED, round)

    def _send(
        self, to: int, stream: int, round: int, flags: int = 0, payload: Tensor | None = None, *, mass: float = 0.0
    ) -> None:
        given = no_payload() if payload is None else payload
        self._port.send(to, Message(Kind.SAMPLE, round, mass, stream, flags, given))

    def _steps_of(self, round: int) -> int:
        steps = self._settings.local_steps
        return steps if self._steps is None else min(steps, self._steps - round * steps)

    def _is_used(self, round: int) -> bool:
        return round in self._used or self._round >= round

    def _has_call(self) -> bool:
        port = self._port
        others = [rank for rank in range(port.size) if rank != self._rank]
        if any(port.newest(rank, Kind.END) >= 0 for rank in others):
            return True
        if any(port.waiting(Kind.JOIN_ASK, stream) for stream in (0, 1)):
            return True  # somebody enters
        # Others may be at the end already; this machine waits for what the run has come to.
        return self._called < self._newest_call() < (self._steps or math.inf)

    def _is_called(self) -> bool:
        if not self._has_call():
            return False
        if self._newest_call() < (self._steps or math.inf):
            self._called = max(self._called, self._newest_call())
        return True

    def _newest_call(self) -> int:
        port = self._port
        others = [rank for rank in range(port.size) if rank != self._rank]
        return max((port.newest(rank, Kind.BARRIER, MEETING_STREAM) for rank in others), default=-1)

    def _forget(self) -> None:
        """Drop what is under way."""
        self._strands.cancel()
        self._roll.forget()
        self._models.clear()
        self._used.clear()
        self._forwarding = -1

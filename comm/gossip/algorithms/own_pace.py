"""What algorithms have in common whose machines exchange in pairs, each at its own pace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from thinwire.comm.gossip.port import Port, Script, Wait
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.swaps import Swap, Swaps
from thinwire.comm.gossip.turn import Turn

_SALT = 0x5357  # keeps these draws apart from others of the same seed


class OwnPace:
    """An algorithm that after each step takes the answers that have come, answers, and asks some neighbours.

    It waits for nobody, so a machine that is slow, late or dead costs the others nothing but its own exchanges. What a
    machine draws is a function of (seed, rank, step).

    Args:
        swaps: the exchanges.
        seed: of the choice of partners.
        deadline_s: how long drain() waits for answers.
    """

    def __init__(self, replica: Replica, port: Port, swaps: Swaps, *, seed: int, deadline_s: float) -> None:
        self._replica = replica
        self._port = port
        self._swaps = swaps
        self._seed = seed
        self._deadline_s = deadline_s
        self._sent_before: dict[int, int] = {}
        self._x: Tensor | None = None  # the weights, while they are worked on

    @property
    def mass(self) -> float:
        return self._swaps.mass

    def hold(self, mass: float) -> None:
        """As SharesMass says."""
        self._swaps.mass = mass

    def before_step(self, turn: Turn) -> Script[None]:
        """Nothing."""
        return
        yield

    def after_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says; it never waits."""
        self._sent_before = dict(self._swaps.sent_bytes)
        self._begin_turn(turn)
        self._take_and_serve()
        if turn.mixing is not None:
            chance = self._chance(turn.step)
            for _ in range(self._asks_of(chance)):
                self._ask_one_of(turn.mixing.sources(self._port.rank), chance)
        self._store()
        return
        yield

    def asked(self) -> bool:
        """As Algorithm says."""
        return self._swaps.is_asked()

    def serve(self) -> None:
        """As Algorithm says."""
        self._answer_all()
        self._store()

    def drain(self) -> Script[None]:
        """As Algorithm says: answers others while it waits for answers, so two that ask one another both get theirs.

        An answer that has not come by the deadline may still come later, and counts then.
        """
        until = self._port.now() + self._deadline_s
        while True:
            self._take_and_serve()
            self._store()
            if not self._swaps.under_way() or self._port.now() >= until:
                return
            yield Wait(lambda: self._swaps.has_news() or self.asked() or not self._swaps.under_way(), until)

    def sent_bytes(self, turn: Turn) -> dict[int, int]:
        """What was sent since the last turn began, answers included: chance decides, so none is known in advance."""
        sent = {rank: count - self._sent_before.get(rank, 0) for rank, count in self._swaps.sent_bytes.items()}
        return {rank: count for rank, count in sent.items() if count}

    def expected_bytes(self, turn: Turn) -> dict[int, float]:
        """Payload bytes that this machine sends at such a turn on average, by machine, answers included.

        Asks that wait for an answer keep a machine from asking more than so many; that is not counted here.
        """
        payload = self._swaps.payload_bytes(self._replica.numel, self._replica.dtype.itemsize)
        return {rank: payload * times for rank, times in self._expected_exchanges(turn).items()}

    def expected_messages(self, turn: Turn) -> float:
        """As expected_bytes(): how many payloads."""
        return sum(self._expected_exchanges(turn).values())

    @property
    def asks_per_turn(self) -> float:
        """How many partners are asked at a turn on average."""
        return 1.0

    def metrics(self) -> dict[str, float]:
        """`mass`; `swaps`, exchanges so far."""
        return {"mass": self._swaps.mass, "swaps": float(self._swaps.made)}

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        return {"mass": self._swaps.mass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        self._swaps.forget()
        self._swaps.mass = float(state["mass"])

    def merged(self) -> None:
        """Nothing to forget: flows under way stay antisymmetric."""

    def _expected_exchanges(self, turn: Turn) -> dict[int, float]:
        """With each neighbour: this machine asks one of its own, all equally likely, and so does the neighbour."""
        if turn.mixing is None:
            return {}
        own = turn.mixing.sources(self._port.rank)
        asks = self.asks_per_turn
        return {rank: asks / len(own) + asks / len(turn.mixing.sources(rank)) for rank in own}

    def _chance(self, step: int) -> np.random.Generator:
        """What this machine draws from at a step."""
        key = np.array([self._seed & (2**64 - 1), _SALT << 32 | self._port.rank], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, step]))

    def _begin_turn(self, turn: Turn) -> None:
        """What comes before the exchanges of a turn."""

    def _asks_of(self, chance: np.random.Generator) -> int:
        """How many partners are asked at a turn."""
        return 1

    def _to_send(self) -> Tensor:
        """What others are to get now."""
        return self._weights()

    def _take(self, swap: Swap) -> None:
        """Add what an exchange brings."""
        self._x = swap.onto(self._weights(), self._swaps.mass)

    def _weights(self) -> Tensor:
        """The replica's weights; to change them, change this tensor, or `_x`, until _store()."""
        if self._x is None:
            self._x = self._replica.weights()
        return self._x

    def _store(self) -> None:
        if self._x is not None:
            self._replica.set_weights(self._x)
            self._x = None

    def _ask_one_of(self, ranks: list[int], chance: np.random.Generator) -> None:
        """Ask one of these machines, each as likely, unless enough asks are under way."""
        if free := self._swaps.can_ask(ranks):
            self._swaps.ask(free[int(chance.integers(len(free)))], self._to_send())

    def _take_and_serve(self) -> None:
        while self._swaps.has_news():
            if (swap := self._swaps.take_answer(self._weights())) is not None:
                self._take(swap)
        self._answer_all()

    def _answer_all(self) -> None:
        while self._swaps.is_asked():
            if (swap := self._swaps.answer(self._to_send())) is not None:
                self._take(swap)

"""One machine of a decentralized run: schedule, algorithm and merge, step by step."""

from __future__ import annotations

from thinwire.comm.gossip.algorithm import Algorithm
from thinwire.comm.gossip.port import Port, Script
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Schedule


class Agent:
    """Runs an algorithm by a schedule. A simulation drives its scripts as a trainer's hooks do.

    Attributes: step, optimizer steps taken.
    """

    def __init__(self, replica: Replica, port: Port, algorithm: Algorithm, schedule: Schedule) -> None:
        self.replica = replica
        self.port = port
        self.algorithm = algorithm
        self.schedule = schedule
        self.step = 0

    def before_step(self) -> Script[None]:
        """Between backward and the optimizer's step."""
        yield from self.algorithm.before_step(self.schedule.turn(self.step))

    def after_step(self) -> Script[None]:
        """After the optimizer's step."""
        turn = self.schedule.turn(self.step)
        yield from self.algorithm.after_step(turn)
        self.step += 1

"""SlowMo: now and then a slow momentum step on what a base algorithm has done meanwhile."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.errors import OwnWeightsError
from thinwire.comm.gossip.algorithm import Algorithm, AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.dpsgd import DPSGDSettings
from thinwire.comm.gossip.merge import average_all
from thinwire.comm.gossip.port import Port, Script
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn
from thinwire.comm.two_shot import split_evenly

_STREAM = 2  # of average_all(): 0 and 1 are the agent's


class SlowMoSettings(AlgorithmSettings):
    """`algorithm: {kind: slowmo, every: 48}`.

    every: optimizer steps between two slow steps. lr: of the slow step, alpha. momentum: slow momentum, beta.
    average: all: a slow step starts from the average over all machines; own: from this machine's weights, so that there
    is no global exchange.
    base: what machines do meanwhile: settings of dpsgd; over a directed graph that is stochastic gradient push, and
    with a schedule that has no exchanges local SGD.
    """

    kind: Literal["slowmo"] = "slowmo"
    every: int = Field(48, gt=0)
    lr: float = Field(1.0, gt=0)
    momentum: float = Field(0.5, ge=0, lt=1)
    average: Literal["all", "own"] = "all"
    base: DPSGDSettings = DPSGDSettings()

    joinable: ClassVar[bool] = False

    def build(self, parts: Parts) -> SlowMo:
        """The algorithm of one machine.

        Raises:
            ValueError: the run ends before the first slow step.
        """
        if parts.steps is not None and self.every > parts.steps:
            raise ValueError(
                f"method.algorithm.every: {self.every} in a run of {parts.steps} steps, which would never make a slow "
                f"step; give {parts.steps} or less, or algorithm: dpsgd"
            )
        return SlowMo(
            parts.replica,
            parts.port,
            self.base.build(parts),
            every=self.every,
            lr=self.lr,
            momentum=self.momentum,
            average=self.average == "all",
            deadline_s=parts.deadline_s,
        )


class SlowMo:
    """SlowMo (Wang et al. 2019, 1910.00643) over D-PSGD, stochastic gradient push or local steps.

    With z the weights after the last slow step and u the slow momentum, at first 0, after every `every` steps

        a <- sum_i m_i x_i / sum_i m_i over all machines      (average "own": a <- x_i, the paper's SlowMo-noaverage)
        u <- momentum u + (z - a) / gamma;   z <- z - lr gamma u;   x_i <- z

    with gamma the optimizer's learning rate of that step. What is on the wire is waited for first. momentum 0 and lr 1
    give x_i <- a. Unlike the paper, the optimizer's own state is kept; and where gamma is 0 (the end of a schedule),
    z <- a and u stays.

    The mean: with average "all", z and u are the same bits on every machine, so all are equal after a slow step; with
    "own", mean(u) <- momentum mean(u) + mean(z - x) / gamma, and lateness moves neither. A machine that was later than
    the deadline is left out of an average and makes no slow step; at the next one its z cancels if lr is 1, and it
    differs from the others by gamma momentum times the difference of the u.

    A merge sets z to the average and keeps u. A machine cannot join: it would need z and u.

    Sends what the base does and, with average "all", 2 (n-1)/n of the vector every `every` steps. Memory: z and u.

    Args:
        base: what machines do meanwhile.
        every, lr, momentum: see above.
        average: from the average over all, instead of one's own weights.
        deadline_s: how long that average waits for the last machine.
    """

    def __init__(
        self,
        replica: Replica,
        port: Port,
        base: Algorithm,
        *,
        every: int,
        lr: float,
        momentum: float,
        average: bool,
        deadline_s: float,
    ) -> None:
        self._replica = replica
        self._port = port
        self._base = base
        self._every = every
        self._alpha, self._beta = lr, momentum
        self._average = average
        self._deadline_s = deadline_s
        self._learned = sum(replica.sizes)
        self._slow = replica.weights()  # z
        self._momentum = torch.zeros(self._learned, dtype=replica.dtype, device=replica.device)  # u
        self._left_out = 0

    @property
    def mass(self) -> float:
        return self._base.mass

    def before_step(self, turn: Turn) -> Script[None]:
        """As the base does."""
        yield from self._base.before_step(turn)

    def after_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says."""
        gamma = self._replica.lr  # before anything else may wait, and a scheduler of learning rates go on
        yield from self._base.after_step(turn)
        if self._is_slow(turn):
            yield from self._base.drain()
            average = yield from self._averaged((turn.step + 1) // self._every)
            if average is not None:
                self._slow_step(average, gamma)

    def asked(self) -> bool:
        """As the base says."""
        return self._base.asked()

    def serve(self) -> None:
        """As the base does."""
        self._base.serve()

    def drain(self) -> Script[None]:
        """As the base does."""
        yield from self._base.drain()

    def sent_bytes(self, turn: Turn) -> dict[int, int]:
        """As Algorithm says; of an average, as long as all machines that are there now stay."""
        sent = dict(self._base.sent_bytes(turn))
        if self._average and self._is_slow(turn):
            lost = self._port.lost()
            members = [rank for rank in range(self._port.size) if rank not in lost]
            slices = dict(zip(members, split_evenly(self._replica.numel, len(members)), strict=True))
            for rank in members:
                if rank != self._port.rank:
                    count = slices[rank] + slices[self._port.rank]
                    sent[rank] = sent.get(rank, 0) + count * self._replica.dtype.itemsize
        return sent

    def metrics(self) -> dict[str, float]:
        """What the base says; `slow_momentum_norm`, of u; `slow_left_out`, averages that this machine was late for."""
        norm = float(self._momentum.norm())
        return {**self._base.metrics(), "slow_momentum_norm": norm, "slow_left_out": float(self._left_out)}

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        return {"base": self._base.state_dict(), "slow": self._slow.clone(), "momentum": self._momentum.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        self._base.load_state_dict(state["base"])
        slow: Tensor = state["slow"]
        self._slow = slow.to(self._replica.device, copy=True)
        self._momentum = state["momentum"].to(self._replica.device, copy=True)

    def merged(self) -> None:
        """z <- the average."""
        self._base.merged()
        self._slow = self._replica.weights()

    def _is_slow(self, turn: Turn) -> bool:
        return (turn.step + 1) % self._every == 0

    def _averaged(self, number: int) -> Script[Tensor | None]:
        """Where the slow step starts from; None if this machine was left out."""
        own = self._replica.weights()
        if not self._average:
            return own
        merged = yield from average_all(
            self._port,
            own,
            self.mass,
            number=number,
            deadline_s=self._deadline_s,
            asked=self._base.asked,
            serve=self._base.serve,
            stream=_STREAM,
        )
        if self._port.rank in merged.nonfinite:
            raise OwnWeightsError(self._port.rank)
        if self._port.rank not in merged.members:
            self._left_out += 1
            return None
        return merged.value

    def _slow_step(self, average: Tensor, gamma: float) -> None:
        slow = average.clone()  # of statistics, which have no momentum
        if gamma != 0.0:
            learned = self._slow[: self._learned]
            self._momentum.mul_(self._beta).add_((learned - average[: self._learned]) / gamma)
            slow[: self._learned] = learned - self._alpha * gamma * self._momentum
        self._slow = slow
        self._replica.set_weights(slow)
        if self._average:
            self._base.merged()

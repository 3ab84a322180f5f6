"""Gradient tracking: every machine steps along an estimate of the mean gradient, so unlike data leave no bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from thinwire.comm.finite import are_finite
from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.in_rounds import InRounds, Wire, mixer_of
from thinwire.comm.gossip.mixer import Mixer
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn


class GradientTrackingSettings(AlgorithmSettings):
    """`algorithm: {kind: gradient_tracking}`.

    wire: what is sent is rounded to.
    """

    kind: Literal["gradient_tracking"] = "gradient_tracking"
    wire: Wire = "fp32"

    def build(self, parts: Parts) -> GradientTracking:
        """The algorithm of one machine."""
        return GradientTracking(parts.replica, mixer_of(parts, self.wire))


class GradientTracking(InRounds):
    """Gradient tracking (Di Lorenzo and Scutari 2016, 1602.00591; Nedic, Olshevsky and Shi 2017, 1607.03218).

    With g_i the gradient at x_i, y_i an estimate of the mean gradient and W the round's mixing (the identity at a step
    without exchange):

        y_i <- y_i + (g_i - g_i of the step before) / m_i      (at the first step y_i = g_i / m_i)
        x_i <- x_i + u(y_i)                                    (the optimizer's update; with SGD -lr y_i)
        x_i <- sum_j w_ij x_j;   y_i <- sum_j w_ij y_j         (one message of two vectors)

    So after every change sum_i m_i y_i = sum_i g_i, with the masses m_i = 1 unless mass is pushed (directed graphs:
    this is Push-DIGing of the second paper, with x and y in place of m x and m y). A flow that comes after its deadline
    is missing from that sum until it has come; nothing else is. At a fixed point all y_i are equal, hence the mean
    gradient, hence zero: the common minimum, whatever each machine's data.

    The other common form, y <- W (y + g - g of the step before), needs the gradient at the new x before it can send y,
    hence two messages one after the other in each step. Here W meets y before the new gradient does, so x and y go
    together: the same traffic, half the waiting. Both have the same fixed point and the same mean.

    A lost machine takes along m y - g: the others' y then average to their mean gradient and what it had given out,
    its last gradient less its last y, as if its objective went on as a linear one. A merge begins tracking anew and
    ends that. A machine that gives half of its mass to one that enters doubles its y, and the new one begins with its
    own gradient, so that the sum counts one gradient more from then on.

    Sends twice what D-PSGD does. Memory: y and one gradient.

    Args:
        mixer: of the rounds, for vectors of weights and y.
    """

    def __init__(self, replica: Replica, mixer: Mixer) -> None:
        super().__init__(replica, mixer, replica.numel + sum(replica.sizes))
        self._tracked: Tensor | None = None  # y
        self._gradient: Tensor | None = None  # the one that y has counted in

    def hold(self, mass: float) -> None:
        """As SharesMass says."""
        if self._tracked is not None:
            self._tracked *= self.mass / mass
        super().hold(mass)

    def before_step(self, turn: Turn) -> Script[None]:
        """Give the optimizer y for the gradient."""
        gradient = self._replica.gradient()[: self._learned]
        if not are_finite([gradient]):
            return  # the optimizer will show it in the weights, which are then not sent; y goes on without it
        change = gradient if self._gradient is None else gradient - self._gradient
        if self.mass != 1.0:
            change = change / self.mass
        self._tracked = change.clone() if self._tracked is None else self._tracked + change
        self._gradient = gradient
        self._replica.set_gradient(self._padded(self._tracked))
        return
        yield

    def after_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says."""
        if turn.mixing is not None:
            value = self._value()
            mixed = yield from self._exchange(turn.round, turn.mixing, value)
            self._adopt(mixed.onto(value))

    def drain(self) -> Script[None]:
        """As Algorithm says."""
        late = yield from self._mixer.settle()
        if late is not None:
            self._adopt(late.onto(self._value()))

    def metrics(self) -> dict[str, float]:
        """What the mixer says, and `tracked_norm`, of y."""
        norm = 0.0 if self._tracked is None else float(self._tracked.norm())
        return {**super().metrics(), "tracked_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        state = super().state_dict()
        if self._tracked is not None and self._gradient is not None:
            state |= {"tracked": self._tracked.clone(), "gradient": self._gradient.clone()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        super().load_state_dict(state)
        device = self._replica.device
        self._tracked = state["tracked"].to(device, copy=True) if "tracked" in state else None
        self._gradient = state["gradient"].to(device, copy=True) if "gradient" in state else None

    def merged(self) -> None:
        """Track anew, on all machines at once: so the sum that is kept is that of machines that are there."""
        self._tracked = self._gradient = None

    def _value(self) -> Tensor:
        tracked = self._tracked
        if tracked is None:  # after a merge, before the next gradient
            tracked = torch.zeros(self._learned, dtype=self._replica.dtype, device=self._replica.device)
        return torch.cat([self._replica.weights(), tracked])

    def _adopt(self, value: Tensor) -> None:
        weights, tracked = value.split([self._replica.numel, self._learned])
        self._replica.set_weights(weights)
        if self._tracked is not None:
            self._tracked = tracked.clone()

    def _padded(self, learned: Tensor) -> Tensor:
        """With zeros for the statistics."""
        return torch.nn.functional.pad(learned, (0, self._replica.numel - self._learned))

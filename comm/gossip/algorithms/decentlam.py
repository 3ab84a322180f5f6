"""DecentLaM: momentum that does not amplify the bias of unlike data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.in_rounds import InRounds, Wire, mixer_of, refuse_directed
from thinwire.comm.gossip.mixer import Mixer
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn


class DecentLaMSettings(AlgorithmSettings):
    """`algorithm: {kind: decentlam}`, with torch.optim.SGD and its momentum.

    wire: what is sent is rounded to.
    """

    kind: Literal["decentlam"] = "decentlam"
    wire: Wire = "fp32"

    every_step: ClassVar[bool] = True
    static_graph: ClassVar[bool] = True
    needs_sgd: ClassVar[bool] = True
    joinable: ClassVar[bool] = False

    def build(self, parts: Parts) -> DecentLaM:
        """The algorithm of one machine.

        Raises:
            ValueError: the graph is directed.
        """
        refuse_directed(parts, self.kind)
        return DecentLaM(parts.replica, mixer_of(parts, self.wire))


class DecentLaM(InRounds):
    """DecentLaM (Yuan et al. 2021, 2104.11981).

    Between the backward pass and the step of SGD with momentum beta, with g the gradient at x:

        s_i = x_i - lr g_i;   ghat_i = (x_i - sum_j w_ij s_j) / lr
        m_i <- beta m_i + ghat_i;   x_i <- x_i - lr m_i            (SGD's step, on ghat)

    With the momentum inside the average (D-PSGD with momentum SGD) the bias that unlike data leave is that of a
    learning rate of lr / (1 - beta); here the fixed point is that of D-PSGD without momentum, (I - (1 - lr) W)^{-1} lr
    W b for f_i = |x - b_i|^2 / 2. The exchange is part of the gradient, so it delays the step.

    The mean: the mean of ghat_i is the mean of g_i, so mean(x) follows momentum SGD on the mean gradient. A flow that
    comes after its deadline enters ghat of its round, so what it moves in the end, flow / (1 - beta), is the same at
    both ends while the learning rate is. What is exact at every moment is sum_i (x_i - lr beta / (1 - beta) m_i) with
    the momentum m, less the flows that have not come.

    It needs the same W at every step, as the paper assumes: momentum goes on moving x along the edges of earlier
    rounds. Where these changed from round to round (n = 8, one-peer exponential, hypercube one dimension at a time,
    random pairs; lr 0.01, beta 0.8 to 0.99) machines diverged. Edges on which messages are late change too: on a ring
    of 8 with lr 0.1 and beta 0.9 the machines' disagreement after 150 steps was up to 4 times as much with 3 % of all
    messages late, 28 to 47 times with 10 %, and at beta 0.8 still 67 to 83 times with 30 %. Give it a deadline that
    neighbours keep.

    At a learning rate of 0 (the first step of a warm-up) x <- W x, and the gradient is left alone. A parameter of 16
    bits has a gradient of 16 bits: its ghat is rounded to that, and the mean with it; give fp32 parameters.

    A machine cannot join: momentum brings back flows of earlier rounds, which are antisymmetric only while all masses
    stay as they were.

    Sends what D-PSGD does. Memory: none.

    Args:
        mixer: of the rounds.
    """

    def __init__(self, replica: Replica, mixer: Mixer) -> None:
        super().__init__(replica, mixer, replica.numel)
        # Flows that drain() has put onto the weights. SGD's next step shall bring them again, with their momentum, so
        # they are taken off before it.
        self._lent: Tensor | None = None

    def before_step(self, turn: Turn) -> Script[None]:
        """Give the optimizer ghat for the gradient."""
        weights, lr = self._replica.weights(), self._replica.lr
        if self._lent is not None:
            weights[: self._learned] -= self._lent
        after = weights.clone()
        if lr != 0.0:
            after[: self._learned] -= lr * self._replica.gradient()[: self._learned]
        if turn.mixing is not None:
            value = after
            mixed = yield from self._exchange(turn.round, turn.mixing, value)
            after = mixed.onto(value)
        if self._lent is not None:
            after[: self._learned] += self._lent
            self._lent = None
        if lr == 0.0:
            self._replica.set_weights(after)
            return
        ghat = (weights - after) / lr
        ghat[self._learned :] = 0.0
        self._replica.set_gradient(ghat)
        weights[self._learned :] = after[self._learned :]  # statistics are no optimizer's
        self._replica.set_weights(weights)

    def after_step(self, turn: Turn) -> Script[None]:
        """Nothing."""
        return
        yield

    def drain(self) -> Script[None]:
        """As Algorithm says. What has come late is on the weights now, and in the momentum from the next step on."""
        late = yield from self._mixer.settle()
        if late is not None:
            before = self._replica.weights()
            after = late.onto(before)
            flows = (after - before)[: self._learned]
            self._lent = flows if self._lent is None else self._lent + flows
            self._replica.set_weights(after)

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        lent = {} if self._lent is None else {"lent": self._lent.clone()}
        return {**super().state_dict(), **lent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        super().load_state_dict(state)
        self._lent = state["lent"].to(self._replica.device, copy=True) if "lent" in state else None

    def merged(self) -> None:
        """The flows that were lent are in the average, for good."""
        self._lent = None

"""D2: decentralized SGD that remembers what the neighbours have changed, so unlike data leave no bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.in_rounds import InRounds, Wire, mixer_of, refuse_directed
from thinwire.comm.gossip.mixer import Mixer
from thinwire.comm.gossip.mixing import Mixing
from thinwire.comm.gossip.port import Script
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn

_ROUNDING = 1e-9


class D2Settings(AlgorithmSettings):
    """`algorithm: {kind: d2, lazy: true}`.

    lazy: mix with (I + W) / 2, for graphs whose W has eigenvalues of -1/3 or less, such as rings of even size.
    wire: what is sent is rounded to.
    """

    kind: Literal["d2"] = "d2"
    lazy: bool = False
    wire: Wire = "fp32"

    every_step: ClassVar[bool] = True
    static_graph: ClassVar[bool] = True
    joinable: ClassVar[bool] = False

    def build(self, parts: Parts) -> D2:
        """The algorithm of one machine.

        Raises:
            ValueError: the graph is directed, or W has an eigenvalue of -1/3 or less.
        """
        refuse_directed(parts, self.kind)
        mixing = parts.graph.mixing(0)
        smallest = float(np.linalg.eigvalsh((lazy(mixing) if self.lazy else mixing).matrix())[0])
        if smallest <= -1 / 3 + _ROUNDING:
            raise ValueError(
                f"method.algorithm.lazy: false with method.graph {parts.graph.name}, whose weights have the eigenvalue "
                f"{smallest:.4f}; d2 diverges unless all are above -1/3: set lazy: true, which mixes with (I + W) / 2"
            )
        return D2(parts.replica, mixer_of(parts, self.wire), lazy=self.lazy)


class D2(InRounds):
    """D2 (Tang et al. 2018, 1803.07068), which is exact diffusion (Yuan et al. 2017, 1702.05122).

        x^1 = W (x^0 - lr g^0);    x^{k+1} = W (2 x^k - x^{k-1} - lr (g^k - g^{k-1}))

    With p = x^k - lr g^k, what the optimizer leaves, and e^k = x^k - p^{k-1}, what the last exchange has changed, at
    first 0, that is

        v = p + e;   x <- W v;   e <- e + (x - v)

    and is done so, with any optimizer's update in place of -lr g. e_i is the sum of all flows that machine i has
    received, and these are the negatives of what its neighbours have: sum_i e_i = 0, so mean(x) moves by the mean
    update exactly. A flow that comes after its deadline is added to e, and to x as often as e would have added it by
    then, so it is missing from these sums only until it has come. Fixed point with SGD: x consensual, e_i = lr g_i,
    hence sum_i g_i = 0: the common minimum.

    It needs the same symmetric W at every step, with eigenvalues above -1/3. A lost machine takes along its e, so the
    others go on as if its objective were the linear one of its last gradient; a merge sets all e to 0. A machine cannot
    join: what it would take over of e belongs to its donor. Statistics are averaged without e.

    e moves x at every later step, so an error in its sum moves the mean in proportion to the steps taken. Mixed in
    fp32, e would take over the rounding of x. Values travel in fp32 all the same, but are mixed in fp64 here, which
    leaves e only the rounding of its own.

    Sends what D-PSGD does. Memory: e, and a vector in fp64 during the exchange.

    Args:
        mixer: of the rounds.
        lazy: mix with (I + W) / 2.
    """

    def __init__(self, replica: Replica, mixer: Mixer, *, lazy: bool = False) -> None:
        super().__init__(replica, mixer, replica.numel)
        self._lazy = lazy
        self._gained = torch.zeros(self._learned, dtype=replica.dtype, device=replica.device)  # e

    def after_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says."""
        value = self._replica.weights().double()
        value[: self._learned] += self._gained
        if turn.mixing is not None:
            mixed = yield from self._exchange(turn.round, lazy(turn.mixing) if self._lazy else turn.mixing, value)
            self._adopt(value, mixed.onto(value), mixed.arrears)
        else:
            self._replica.set_weights(value.to(self._replica.dtype))

    def drain(self) -> Script[None]:
        """As Algorithm says."""
        late = yield from self._mixer.settle()
        if late is not None:
            before = self._replica.weights().double()
            self._adopt(before, late.onto(before), late.arrears)

    def metrics(self) -> dict[str, float]:
        """What the mixer says, and `correction_norm`, of e."""
        return {**super().metrics(), "correction_norm": float(self._gained.norm())}

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        return {**super().state_dict(), "gained": self._gained.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        super().load_state_dict(state)
        self._gained = state["gained"].to(self._replica.device, copy=True)

    def merged(self) -> None:
        """e <- 0, on all machines at once."""
        self._gained.zero_()

    def _adopt(self, before: Tensor, after: Tensor, arrears: Tensor | None) -> None:
        """Take over what an exchange has made of `before`."""
        self._gained += (after - before)[: self._learned]
        if arrears is not None:
            after[: self._learned] += arrears[: self._learned]
        self._replica.set_weights(after.to(self._replica.dtype))


def lazy(mixing: Mixing) -> Mixing:
    """(I + W) / 2: the same fixed points, and no eigenvalue below 0."""
    rows = [{j: w / 2 for j, w in row.items()} | {i: (1 + row.get(i, 0.0)) / 2} for i, row in enumerate(mixing.rows)]
    return Mixing(rows, mixing.symmetric)

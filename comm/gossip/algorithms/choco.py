"""CHOCO-SGD: neighbours exchange compressed differences, and average what they know of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors import AnyCompressor
from thinwire.comm.compress.compressors.dense import Dense
from thinwire.comm.compress.compressors.low_rank import LowRank
from thinwire.comm.compress.compressors.rand_k import RandK
from thinwire.comm.compress.compressors.top_k import TopK
from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.choco_codec import ChocoCodec
from thinwire.comm.gossip.algorithms.dpsgd import DPSGD
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.damped_mixer import DampedMixer
from thinwire.comm.gossip.port import Port, Script
from thinwire.comm.gossip.replica import Replica
from thinwire.comm.gossip.turn import Turn

_WINDOW_ROUNDS = 20


class ChocoSettings(AlgorithmSettings):
    """`algorithm: {kind: choco, compressor: {kind: topk, density: 0.01}}`.

    compressor: what C is, as in method compress; a name alone means its defaults. It sees all weights as one vector,
      so that the entries of all tensors compete. none sends the weights themselves.
    gamma: step size of the averaging, above 0, at most 1; null: 1.8 k/d for the k largest of d entries, and by the
      compressor's contraction for others; see default_gamma.
    adapt: halve gamma, each machine its own, whenever the rounds themselves drive the weights away from their public
      copies; see StepGuard.
    overlap: as for dpsgd.
    start: what public copies begin from. weights: those that all machines begin with, known without a word. zero: as in
      the paper; then averaging is blind to every entry until it has been sent once.
    """

    kind: Literal["choco"] = "choco"
    compressor: AnyCompressor = TopK(density=0.01)
    gamma: float | None = Field(None, gt=0, le=1)
    adapt: bool = True
    overlap: bool = False
    start: Literal["weights", "zero"] = "weights"

    static_graph: ClassVar[bool] = True

    @model_validator(mode="after")
    def _usable(self) -> ChocoSettings:
        if isinstance(self.compressor, LowRank):
            raise ValueError(
                "compressor: lowrank needs matrices, and choco compresses all weights as one vector; give topk, randk, "
                "threshold, sign, int4, int8, bf16 or none"
            )
        by_tensor = isinstance(self.compressor, TopK) and self.compressor.scope == "tensor"
        if by_tensor and "scope" in self.compressor.model_fields_set:
            raise ValueError(
                "compressor.scope: 'tensor' ranks the entries of each tensor by themselves, but choco compresses all "
                "weights as one vector; give scope: global, or leave it out, or set k and chunk"
            )
        if self.gamma is None and _contraction(self.compressor, 1 << 20) is None:
            raise ValueError(
                f"gamma: null takes it from the compressor's contraction, and {self.compressor.kind} as it is set "
                "guarantees none; give gamma, such as 0.1, or another compressor"
            )
        return self

    def build(self, parts: Parts) -> Choco:
        """The algorithm of one machine."""
        gamma = self.gamma or default_gamma(self.compressor, parts.replica.numel)
        if isinstance(self.compressor, Dense):
            # C = identity: the copies would be the weights themselves.
            return Choco(parts.replica, parts.port, Plain(), parts.deadline_s, gamma, None, overlap=self.overlap)
        weights = parts.replica.weights()
        start = weights if self.start == "weights" else torch.zeros_like(weights)
        codec = ChocoCodec(self.compressor, rank=parts.port.rank, seed=parts.seed, start=start)
        guard = StepGuard() if self.adapt else None
        return Choco(parts.replica, parts.port, codec, parts.deadline_s, gamma, guard, overlap=self.overlap)


class Choco(DPSGD):
    """CHOCO-SGD (Koloskova, Stich, Jaggi 2019, 1902.00340; Koloskova, Lin, Stich, Jaggi 2020, 1907.09356).

    After the optimizer's step, of any optimizer, in every round:

        q_i = C(x_i - xhat_i);  send q_i;  xhat_j <- xhat_j + q_j  for j = i and all neighbours
        x_i <- x_i + gamma sum_j w_ij (xhat_j - xhat_i)

    The mean of x is preserved exactly, whatever C leaves out. Differences from the paper: gamma is each machine's own,
    and an edge takes the smaller of its two; every neighbour's copy is kept (degree + 1 copies in all, instead of two
    with only their weighted sum), without which flows that come late could not be undone at both ends alike; copies
    begin from the common weights rather than zero, and after a merge from its average; with `overlap`, what a round
    brings is added one step later. The neighbours must be the same in every round.

    Args:
        codec: a ChocoCodec, or Plain where C is the identity.
        deadline_s: of a round.
        gamma: step size to begin with.
        guard: that lowers it; None: it stays.
    """

    def __init__(
        self,
        replica: Replica,
        port: Port,
        codec: ChocoCodec | Plain,
        deadline_s: float,
        gamma: float,
        guard: StepGuard | None,
        *,
        overlap: bool = False,
    ) -> None:
        self._damped = DampedMixer(port, codec, deadline_s=deadline_s, gamma=gamma)
        super().__init__(replica, port, self._damped, overlap=overlap)
        self._codec = codec
        self._gamma = gamma
        self._guard = guard
        self._neighbours: list[int] | None = None

    def after_step(self, turn: Turn) -> Script[None]:
        """As Algorithm says.

        Raises:
            ValueError: the neighbours are not those of the rounds before.
        """
        if turn.mixing is not None:
            sources = turn.mixing.sources(self._port.rank)
            if self._neighbours is None:
                self._neighbours = sources
            if sources != self._neighbours and isinstance(self._codec, ChocoCodec):
                raise ValueError(
                    f"method.algorithm: choco needs the same neighbours in every round, but machine {self._port.rank} "
                    f"has {sources} in round {turn.round} and had {self._neighbours}; give a graph such as ring, "
                    "torus, hypercube, complete or edges"
                )
        yield from super().after_step(turn)

    def merged(self) -> None:
        """Public copies begin anew from the average, which all machines have."""
        if isinstance(self._codec, ChocoCodec):
            self._codec.begin_from(self._replica.weights())

    def expected_bytes(self, turn: Turn) -> dict[int, int]:
        """As sent_bytes(), also before a payload whose length the data decide has been sent."""
        if turn.mixing is None:
            return {}
        count = self._codec.expected_bytes(self._replica.numel, self._replica.dtype.itemsize)
        return dict.fromkeys(turn.mixing.sources(self._port.rank), count)

    def metrics(self) -> dict[str, float]:
        """What the mixer says; `gamma`; `residual`, ||x - xhat|| after the last round's exchange."""
        own = {"gamma": self._damped.gamma}
        if isinstance(self._codec, ChocoCodec):
            own["residual"] = float(self._codec.residual.norm())
        return {**super().metrics(), **own}

    def state_dict(self) -> dict[str, Any]:
        """As Algorithm says."""
        guard = {} if self._guard is None else {"guard": self._guard.state_dict()}
        return {**super().state_dict(), "gamma": self._damped.gamma, **guard}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As Algorithm says."""
        super().load_state_dict(state)
        self._damped.gamma = float(state["gamma"])
        if self._guard is not None and "guard" in state:
            self._guard.load_state_dict(state["guard"])

    def _finish(self, weights: Tensor | None = None) -> Script[None]:
        mixed = yield from self._mixer.finish()
        value = mixed.onto(self._replica.weights() if weights is None else weights)
        self._replica.set_weights(value)
        self._under_way = False
        if self._guard is not None and isinstance(self._codec, ChocoCodec):
            flow = mixed.average - mixed.sent
            after = float((self._codec.residual + flow).square().sum(dtype=torch.float64))
            self._damped.gamma = self._guard.next_gamma(self._damped.gamma, self._gamma, self._codec.before, after)


class StepGuard:
    """Finds a gamma that is too large by what the rounds do to ||x - xhat||^2, and one that may grow again.

    Where gamma is too large, a round's flow adds more to the residual x - xhat than C takes away, and disagreement
    grows without bound. So over windows of 20 rounds the residuals before and after each round are summed: if those
    after are larger by 2 %, gamma is halved; otherwise it grows by a fifth, up to where it began. What local steps add
    to the residual lies between the rounds and is not held against them. It costs no message: the step size of an edge
    is the smaller one of its ends.
    """

    def __init__(self, window_rounds: int = _WINDOW_ROUNDS) -> None:
        self._window_rounds = window_rounds
        self._rounds = 0
        self._before = 0.0
        self._after = 0.0

    def next_gamma(self, gamma: float, most: float, before: float, after: float) -> float:
        """The step size after one more round.

        Args:
            gamma, most: that of the round, and the one to begin with.
            before, after: ||x - xhat||^2 before and after the round.
        """
        self._rounds += 1
        self._before += before
        self._after += after
        if self._rounds < self._window_rounds:
            return gamma
        grew = self._after > 1.02 * self._before
        self._rounds, self._before, self._after = 0, 0.0, 0.0
        return gamma / 2 if grew else min(most, 1.2 * gamma)

    def state_dict(self) -> dict[str, float]:
        """The window so far."""
        return {"rounds": float(self._rounds), "before": self._before, "after": self._after}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take back what state_dict() gave."""
        self._rounds = int(state["rounds"])
        self._before, self._after = float(state["before"]), float(state["after"])


def default_gamma(compressor: Compressor, numel: int) -> float:
    """A step size that was stable on every graph tried, from the contraction alpha of C: k/d for k of d entries.

    The largest entries are sent soonest, which is worth much: 1.8 alpha. Random ones wait 1/alpha rounds on average,
    and some much longer, while the flow goes on: 0.5 alpha, which the second moment of 1 - T gamma (1 - lambda) bounds,
    with T rounds waited and any eigenvalue lambda of W. Where every element is sent, alpha is the worst case of a
    single large one; 0.45, as the paper's code has for signs, was stable for all.
    """
    alpha = _contraction(compressor, numel) or 0.0
    if isinstance(compressor, RandK):
        return 0.5 * alpha
    return min(1.0, max(1.8 * alpha, 0.0 if compressor.sparse else 0.45))


def _contraction(compressor: Compressor, numel: int) -> float | None:
    return compressor.contraction(torch.empty(numel, device="meta"))

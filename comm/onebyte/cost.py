"""Beyond how many contributions per round a machine spends more on applying them than on its forward passes.

Measuring its own slopes takes a machine the same time however many machines take part; applying theirs takes one sweep
of random numbers over the weights for each. Both are measured on the running model.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from thinwire.comm.onebyte.lattice import Lattice
from thinwire.comm.onebyte.measure import Closure
from thinwire.comm.onebyte.settings import OneByteSettings
from thinwire.kernels.lattice_add import lattice_add

_SAMPLE = 1 << 20  # elements that are swept to see what one takes
_FEW, _MANY = 4, 36  # directions: their difference leaves out what a pass costs in itself
_REPEATS = 3
_logger = logging.getLogger("thinwire.onebyte")


class CostModel:
    """Learns in the first step what forward passes cost, and says so once.

    Args:
        lattice: the trained tensors.
        settings: of the run.
    """

    def __init__(self, lattice: Lattice, settings: OneByteSettings) -> None:
        self._lattice = lattice
        self._settings = settings
        self._contribution_s: float | None = None
        self._evaluations_s: list[float] = []
        self._told = False

    @property
    def contribution_s(self) -> float:
        """Seconds that one more contribution takes to apply."""
        if self._contribution_s is None:
            self._contribution_s = contribution_s(self._lattice)
        return self._contribution_s

    @property
    def most_contributions(self) -> int | None:
        """Contributions in a round that take as long to apply as this machine's forward passes; None: not known yet."""
        if not self._evaluations_s:
            return None
        return most_contributions(self._passes * min(self._evaluations_s), self.contribution_s)

    def timed(self, closure: Closure) -> Closure:
        """The closure; in the first step its evaluations are timed, of which the fastest counts."""
        if self._told:
            return closure

        def run() -> Tensor | float:
            began = time.monotonic()
            loss = closure()
            if isinstance(loss, Tensor) and loss.is_cuda:
                torch.cuda.synchronize(loss.device)
            self._evaluations_s.append(time.monotonic() - began)
            return loss

        return run

    def tell(self, contributions: int) -> None:
        """Log describe() once it can say more than at the start; contributions: of a round."""
        if not self._told and self._evaluations_s:
            self._told = True
            if self._settings.directions == "distinct":
                _logger.info("%s", self.describe(contributions))

    def describe(self, contributions: int | None = None) -> str:
        """A line: what applying contributions costs beside measuring them, and what to choose if it is too much."""
        one, settings = _time(self.contribution_s), self._settings
        if settings.directions == "shared":
            return (
                f"directions are shared: a round applies {settings.samples} of them, {one} each, however many machines "
                "take part"
            )
        if settings.directions == "subspace":
            return (
                "a matrix product applies any number of contributions; where tensors are too small for it, one more "
                f"takes {one}"
            )
        line = f"applying one more contribution takes {one}"
        most = self.most_contributions
        if most is None:
            return f"{line}; how many outweigh the forward passes shows after the first round"
        line += (
            f", this machine's {self._passes} forward passes {_time(self._passes * min(self._evaluations_s))}: beyond "
            f"{most:,} contributions per round, applying them outweighs measuring them"
        )
        if contributions is not None:
            line += f"; this run has {contributions:,}"
            line += ": choose directions: subspace, or shared" if contributions > most else ""
        return line

    @property
    def _passes(self) -> int:
        samples = self._settings.samples
        return 2 * samples if self._settings.estimate == "two_sided" else samples + 1


def most_contributions(forward_s: float, contribution_s: float) -> int:
    """How many contributions are applied in the time of a machine's forward passes."""
    return math.floor(forward_s / max(contribution_s, 1e-9))


def contribution_s(lattice: Lattice) -> float:
    """Measure the seconds that one more contribution adds to a pass over the weights; these stay as they are."""
    swept = lattice.swept_elements
    if not swept:
        return 0.0
    device = lattice.device
    weights = torch.zeros(min(swept, _SAMPLE), device=device)
    out = torch.empty_like(weights)

    def sweep(directions: int) -> Callable[[], int]:
        places = torch.arange(2 * directions, device=device).view(-1, 2)
        units = torch.ones(directions, dtype=torch.int32, device=device)
        return lambda: lattice_add(weights, units, places, key=0, tensor=0, exponent=24, out=out)

    few, many = _fastest(sweep(_FEW), sweep(_MANY))
    # On a busy machine the difference may come out as nothing; a share of the whole is an upper bound then.
    return ((many - few) / (_MANY - _FEW) if many > few else many / _MANY) * swept / len(weights)


def _fastest(*works: Callable[[], int]) -> list[float]:
    """Seconds of each work, in turns. lattice_add returns a number of the host's, so it has ended when it returns."""
    fastest = [math.inf] * len(works)
    for repeat in range(1 + _REPEATS):
        for n, work in enumerate(works):
            began = time.monotonic()
            work()
            if repeat:  # the first one may compile
                fastest[n] = min(fastest[n], time.monotonic() - began)
    return fastest


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} us"

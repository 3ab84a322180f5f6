"""The settings of a one-byte run, for YAML files and for OneByteSPSA alike."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from thinwire.comm.onebyte.byte_code import STEPS_PER_OCTAVE
from thinwire.comm.onebyte.flood import AllGatherSettings, ExchangeSettings
from thinwire.comm.onebyte.manifest import Numerics
from thinwire.comm.settings import Settings


class OneByteSettings(Settings):
    """Shared-randomness SPSA.

    lr: learning rate; eps: size of the perturbation of each weight. eps is taken to the nearest power of two.
    samples: directions that this machine tries in each round.
    estimate: two_sided compares the losses at w + eps z and w - eps z; one_sided those at w + eps z and at w, which
      all of a round's directions share: samples + 1 evaluations instead of 2 * samples.
    directions: distinct (each machine its own), shared (all machines the same, so that a round costs the same however
      many they are), or subspace (of rank^2 dimensions for each matrix, so that any number of contributions is applied
      by one matrix product; smaller tensors keep directions of their own).
    rank, basis_every: of the subspace: how many vectors span it on each side, and for how many rounds it holds. If N
      contributions fall into that time, the variance of estimates is 1 + N / rank^2 times that of distinct directions;
      a longer time makes replaying many rounds cheaper.
    distribution: of a direction's entries: rademacher (+1 or -1), or gaussian (the set bits of a word, minus 16).
    scaling: divide the sum of the contributions by their number (mean) or by its square root (sqrt).
    step_size: fixed; std divides by the standard deviation of the round's slopes (FZOO); ema by the root of their
      running mean square (MEAZO), with decay ema_decay.
    weight_decay: of matrices, per unit of learning rate, settled at snapshots.
    snapshot_every: rounds between two snapshots.
    kept: share of each tensor's weights, the smallest ones, that move until the next snapshot (Sparse MeZO).
    robust: clip or drop slopes of more than robust_factor times the round's median size; median of all machines'
      slopes, for shared directions.
    exchange: in a fixed job, all_gather (straight from all to all) or {kind: flood, graph: ring}: from neighbour to
      neighbour over a graph.
    seed: makes runs with equal weights and settings differ.
    slope_floor: the smallest slope that a byte can say; the largest is 55,000 times that. Taken to a power of two.
    """

    kind: Literal["onebyte"] = "onebyte"
    lr: float = Field(1e-6, gt=0)
    eps: float = Field(1e-3, gt=0, lt=1)
    samples: int = Field(1, gt=0, le=1 << 15)
    estimate: Literal["two_sided", "one_sided"] = "two_sided"
    directions: Literal["distinct", "shared", "subspace"] = "distinct"
    distribution: Literal["rademacher", "gaussian"] = "rademacher"
    scaling: Literal["mean", "sqrt"] = "mean"
    step_size: Literal["fixed", "std", "ema"] = "fixed"
    ema_decay: float = Field(0.99, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    snapshot_every: int = Field(1000, gt=0)
    kept: float = Field(1.0, gt=0, le=1)
    rank: int = Field(32, gt=0, le=256)
    basis_every: int = Field(1, gt=0)
    robust: Literal["none", "clip", "drop", "median"] = "none"
    robust_factor: float = Field(2.5, gt=1)
    slope_floor: float = Field(2.0**-8, ge=2.0**-64, le=2.0**64)
    seed: int = Field(0, ge=0, lt=1 << 63)
    exchange: ExchangeSettings = AllGatherSettings()

    @model_validator(mode="after")
    def _fit_together(self) -> OneByteSettings:
        if self.robust == "median" and self.directions != "shared":
            raise ValueError(
                f"robust: median needs directions: shared, not {self.directions}: slopes along different directions "
                "have no median; take clip or drop"
            )
        if self.directions == "subspace" and self.distribution == "gaussian":
            raise ValueError("directions: subspace has entries of +1 and -1 alone; give distribution: rademacher")
        if self.step_size == "std" and self.directions == "shared" and self.samples == 1:
            raise ValueError("step_size: std needs two slopes or more in a round; give samples > 1, or step_size: ema")
        return self

    def numerics(self) -> Numerics:
        """The part that the weights depend on, in whole numbers where machines could round differently."""
        return Numerics(
            eps_log2=nearest_log2(self.eps / math.sqrt(8.0) if self.distribution == "gaussian" else self.eps),
            directions=self.directions,
            distribution=self.distribution,
            scaling=self.scaling,
            step_size=self.step_size,
            ema_decay=self.ema_decay,
            snapshot_every=self.snapshot_every,
            kept=self.kept,
            robust=self.robust,
            robust_steps=round(STEPS_PER_OCTAVE * math.log2(self.robust_factor)),
            floor_log2=nearest_log2(self.slope_floor),
            rank=self.rank,
            basis_every=self.basis_every,
        )


def nearest_log2(number: float) -> int:
    """The exponent of the power of two nearest to a positive number, on a logarithmic scale."""
    return round(math.log2(number))

"""SPARTA: in each round neighbours average a few of their weights, at places that all know without being told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.compressors.rand_k import random_subset
from thinwire.comm.compress.draw import Draw
from thinwire.comm.gossip.algorithm import AlgorithmSettings, Parts
from thinwire.comm.gossip.algorithms.dpsgd import DPSGD, WIRE
from thinwire.comm.gossip.algorithms.in_rounds import refuse_directed
from thinwire.comm.gossip.codec import Plain
from thinwire.comm.gossip.damped_mixer import DampedMixer


class SpartaSettings(AlgorithmSettings):
    """`algorithm: {kind: sparta, density: 0.005}`.

    SPARTA (Baioumy and Cheema 2025, openreview stFPf3gzq1): after the optimizer's step, in every round,

        x_i[S] <- sum_j w_ij x_j[S]

    for a random set S of density * d of the d weights, another one in each round. S is a function of the seed and the
    round, so that nothing but the values travels, and lost or late rounds confuse nobody. Differences from the paper:
    neighbours on any symmetric graph instead of all machines; a set of fixed size instead of independent draws, so that
    bytes are known. The mean of all weights is preserved as by dpsgd.

    density: kept / all; at least one weight. The paper uses 0.0005 to 0.005.
    overlap: as for dpsgd: what a round brings is added one step later.
    wire: what values are rounded to on the way.
    """

    kind: Literal["sparta"] = "sparta"
    density: float = Field(0.005, gt=0, le=1)
    overlap: bool = False
    wire: Literal["fp32", "bf16", "fp16"] = "fp32"

    def build(self, parts: Parts) -> DPSGD:
        """The algorithm of one machine: dpsgd with a codec that says less."""
        refuse_directed(parts, "sparta")
        codec = SubsetCodec(self.density, parts.seed, Plain(WIRE[self.wire]))
        mixer = DampedMixer(parts.port, codec, deadline_s=parts.deadline_s)
        return DPSGD(parts.replica, parts.port, mixer, overlap=self.overlap)


class SubsetCodec:
    """Codec of the elements in a random set that sender and receivers draw alike; the public vector is zero elsewhere.

    So both ends' flows are zero there, whatever round they belong to. Masses must not move with such a part of the
    weights: a DampedMixer's do not.

    Args:
        density: of the set; at least one element.
        seed: the same on all machines.
        values: how the elements of the set are written.
    """

    remembers = False

    def __init__(self, density: float, seed: int, values: Plain) -> None:
        self._density = density
        self._seed = seed
        self._values = values
        self._drawn: tuple[int, int, Tensor] | None = None

    def encode(self, round: int, value: Tensor) -> tuple[Tensor, Tensor]:
        """As Codec says."""
        places = self._places(round, value)
        payload, public = self._values.encode(round, value[places])
        return payload, torch.zeros_like(value).index_copy_(0, places, public)

    def decode(self, source: int, round: int, payload: Tensor, like: Tensor) -> Tensor:
        """As Codec says."""
        places = self._places(round, like)
        values = self._values.decode(source, round, payload, like.new_empty(len(places)))
        return torch.zeros_like(like).index_copy_(0, places, values)

    def payload_bytes(self, numel: int, itemsize: int) -> int | None:
        """As Codec says."""
        return self._values.payload_bytes(self._count(numel), itemsize)

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""

    def _count(self, numel: int) -> int:
        return max(1, round(self._density * numel))

    def _places(self, round: int, like: Tensor) -> Tensor:
        """The set of a round; drawn once for this machine's vector and all its neighbours'."""
        if self._drawn is None or self._drawn[:2] != (round, like.numel()):
            shared = Draw(self._seed, round, "sparta", 0).shared()
            places = random_subset(like.numel(), self._count(like.numel()), shared)
            self._drawn = round, like.numel(), places.to(like.device)
        return self._drawn[2]

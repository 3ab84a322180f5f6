"""Mean of matrices as the product of two thin factors, which are averaged in place of the matrices: PowerSGD."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.compress.collective import Job
from thinwire.comm.compress.collectives.contribution import fill_with_nan, nothing
from thinwire.comm.compress.collectives.flat import shaped_like
from thinwire.comm.compress.compressors.dense import saturating_cast
from thinwire.comm.compress.compressors.low_rank import FACTOR_DTYPES, LowRank, orthonormalise, random_start
from thinwire.comm.compress.decoded import Decoded
from thinwire.comm.finite import are_finite
from thinwire.comm.two_shot import TwoShotMean


@dataclass(frozen=True)
class _Batch:
    """Tensors of a call that are matrices of one shape; places: which of the call's tensors."""

    places: list[int]
    rows: int
    columns: int
    rank: int


class LowRankMean:
    """outputs <- P Q^T: P an orthonormal basis of mean_r(M_r) Q0, Q = mean_r(M_r^T P), for all matrices of a call.

    PowerSGD: Vogels, Karimireddy, Jaggi (2019), arXiv 1905.13727, with weights[r] in both means. Q0 is the Q of the
    last step that was committed, and at first, or with warm_start off, random. All factors P of a call are averaged in
    one exchange, all Q in a second one; matrices of one shape are multiplied as one batch. Differs from the paper in
    that Q0 is made orthonormal, which leaves its span and keeps P in the range of half precision, and in what is left
    behind: rank r contributes P P^T M_r, of which the decoded tensor is the mean, so that the mean of the errors is the
    paper's. Tensors that settings.factors() leaves whole are averaged in fp32 in an exchange of their own.

    Every rank computes P from the same bytes; it is the same everywhere where the processors, and so the order of
    their linear algebra's sums, are. An absent rank sends zeros.

    Args:
        settings: of the compressor `lowrank`.
    """

    def __init__(self, settings: LowRank) -> None:
        self.settings = settings
        self._dtype = FACTOR_DTYPES[settings.dtype]
        self._factor_mean = TwoShotMean(self._dtype)
        self._whole_mean = TwoShotMean(torch.float32)
        self._starts: dict[str, Tensor] = {}  # Q by name
        self._staged: dict[str, Tensor] = {}

    def mean(self, channel: Channel, job: Job) -> list[Decoded] | None:
        """As in Collective."""
        weight = 1.0 if job.weights is None else job.weights[channel.rank]
        device = job.inputs[0].device
        whole, batches = self._sort([x.shape for x in job.inputs])
        rest = [_given(job, i, torch.empty_like(job.inputs[i])) for i in whole]
        matrices = [torch.empty(len(b.places), b.rows, b.columns, device=device) for b in batches]
        for batch, stack in zip(batches, matrices, strict=True):
            for i, matrix in zip(batch.places, stack, strict=True):
                _given(job, i, matrix)
        finite = are_finite([*rest, *matrices])

        whole_mean = self._mean_whole(channel, rest, weight)
        starts = [self._start(b, job, device) for b in batches]
        left, _ = self._mean_factors(channel, [m @ q for m, q in zip(matrices, starts, strict=True)], weight, finite)
        broken = not are_finite([*left, *whole_mean])  # the same on every rank; the bytes of a step stay the same too
        left = [orthonormalise(p.zero_() if broken else p) for p in left]
        products = [m.mT @ p for m, p in zip(matrices, left, strict=True)]
        right, own = self._mean_factors(channel, products, weight, finite and not broken)
        if broken or not all(_product_is_finite(q) for q in right):
            fill_with_nan(job.outputs)
            return None

        contributed: list[Decoded] = nothing(job.inputs)
        for i, x, mean in zip(whole, rest, whole_mean, strict=True):
            job.outputs[i].copy_(mean)
            if job.memories is not None:
                torch.sub(x, x if weight else 0.0, out=job.memories[i][1])  # it is sent whole, or not at all
            elif weight:
                contributed[i] = x.view(-1)
        for batch, *stacks in zip(batches, matrices, starts, left, right, own, strict=True):
            for i, matrix, start, p, q, mine in zip(batch.places, *stacks, strict=True):
                torch.mm(p, q.mT, out=job.outputs[i].view_as(matrix))
                # From a Q of zeros nothing can start; a gradient that was zero tells nothing new.
                self._staged[job.names[i]] = q if bool(q.any()) else start
                if job.memories is not None:
                    torch.addmm(matrix, p, mine.mT, alpha=-1 if weight else 0, out=job.memories[i][1].view_as(matrix))
                elif weight:
                    contributed[i] = (p @ mine.mT).view(-1)
        return contributed if job.memories is None else []

    def commit(self) -> None:
        """Keep the Q of this step."""
        if self.settings.warm_start:
            self._starts |= self._staged
        self._staged = {}

    def rollback(self) -> None:
        """Forget the Q of this step."""
        self._staged = {}

    def surrendered(self) -> list[tuple[str, int, Tensor]]:
        """Nothing: the warm starts are the same on every rank."""
        return []

    def sent_bytes(self, shapes: Mapping[str, Sequence[int]], rank: int, size: int) -> dict[int, int]:
        """As in Collective; exact."""
        sizes = [torch.Size(shape) for shape in shapes.values()]
        whole, batches = self._sort(sizes)
        total = self._whole_mean.sent_bytes(sum(sizes[i].numel() for i in whole), rank, size)
        for side in ("rows", "columns"):
            numel = sum(len(b.places) * getattr(b, side) * b.rank for b in batches)
            for r, count in self._factor_mean.sent_bytes(numel, rank, size).items():
                total[r] += count
        return total

    def means(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """How many averages of a call come one after another: whole tensors, the P, the Q."""
        whole, batches = self._sort([torch.Size(shape) for shape in shapes.values()])
        return bool(whole) + 2 * bool(batches)

    def kept_bytes(self, shapes: Mapping[str, Sequence[int]], rank: int, size: int) -> int:
        """Of the warm starts, in fp32."""
        _, batches = self._sort([torch.Size(shape) for shape in shapes.values()])
        return sum(4 * len(b.places) * b.columns * b.rank for b in batches) if self.settings.warm_start else 0

    def state_dict(self) -> dict[str, Any]:
        """The warm starts, the same on every rank: {"starts": {name: fp32 (columns, rank)}}."""
        return {"starts": {name: q.clone() for name, q in self._starts.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what state_dict() gave."""
        self._staged = {}
        self._starts = {name: q.clone() for name, q in state["starts"].items()}

    def merge(self, states: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
        """As in Collective: any rank's."""
        return dict(states[0])

    def _sort(self, shapes: Sequence[torch.Size]) -> tuple[list[int], list[_Batch]]:
        """Which tensors are averaged whole, and which as matrices, those of one shape together."""
        whole, batches = [], defaultdict(list)
        for i, shape in enumerate(shapes):
            factors = self.settings.factors(shape) if shape.numel() else None
            if factors is None:
                whole.append(i)
            else:
                batches[factors].append(i)
        return whole, [_Batch(places, *factors) for factors, places in batches.items()]

    def _start(self, batch: _Batch, job: Job, device: torch.device) -> Tensor:
        """Q0 of each matrix of a batch, orthonormal."""
        starts = []
        for i in batch.places:
            start = self._starts.get(job.names[i])
            if start is None or start.shape != (batch.columns, batch.rank):
                start = random_start(batch.columns, batch.rank, job.draws[i])
            starts.append(start.to(device))
        return orthonormalise(torch.stack(starts))

    def _mean_whole(self, channel: Channel, tensors: Sequence[Tensor], weight: float) -> list[Tensor]:
        if not sum(x.numel() for x in tensors):
            return [x * weight for x in tensors]
        flat = torch.cat([x.flatten() for x in tensors])
        if weight != 1.0:
            flat *= weight
        self._whole_mean(channel, flat)
        return shaped_like(flat, tensors)

    def _mean_factors(
        self, channel: Channel, factors: Sequence[Tensor], weight: float, finite: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The means of all factors in one exchange, and what this rank's own were, without the weight, in fp32.

        finite: whether this rank's matrices are; if not, the mean is to be NaN on every rank.
        """
        if not factors:
            return [], []
        flat = torch.cat([x.flatten() for x in factors])
        flat = saturating_cast(flat * weight, self._dtype)
        if not finite:
            flat.fill_(float("nan"))
        own = flat.to(torch.float32, copy=True)
        if weight not in {0.0, 1.0}:
            own /= weight
        self._factor_mean(channel, flat)
        return shaped_like(flat.to(torch.float32), factors), shaped_like(own, factors)


def _given(job: Job, i: int, out: Tensor) -> Tensor:
    """out <- the input of a tensor, with its memory; returns out, which has as many elements."""
    x = job.inputs[i].view_as(out)
    return out.copy_(x) if job.memories is None else torch.add(x, job.memories[i][0].view_as(out), out=out)


def _product_is_finite(right: Tensor) -> bool:
    """Whether P Q^T is, for any P whose columns are orthonormal: no entry of it is larger than one row of Q adds up to.

    right: fp32 (batch, columns, rank).
    """
    return bool(torch.isfinite(right.abs().sum(-1)).all())

"""EF21 with momentum, and EF21 with ranks that sit out some steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.decoded import Decoded
from thinwire.comm.compress.draw import Draw
from thinwire.comm.compress.feedback.ef21 import EF21Feedback
from thinwire.comm.compress.feedback.protocol import FeedbackSettings, Place
from thinwire.comm.compress.feedback.store import Storage
from thinwire.comm.settings import FROM_LIST

Probability = Annotated[float, Field(gt=0.0, le=1.0)]


class EF21SGDM(FeedbackSettings):
    """`feedback: ef21_sgdm`: EF21 of a running mean of the gradient, so that batches may be small.

    Fatkhullin, Tyurin, Richtárik (2023), arXiv 2305.15155. On each rank:

        v <- (1 - eta) v + eta g_t;  c = C(v - g_i);  g_i <- g_i + c;  g <- g + mean c;  x <- x - lr g

    v starts as the first gradient. As v is the momentum, the optimizer needs none of its own.
    Memory: 20 bytes per parameter, or with storage "int8", which v alone may have, 14.03.

    Args:
        eta: weight of the newest gradient; 1 gives EF21.
    """

    kind: Literal["ef21_sgdm"] = "ef21_sgdm"
    eta: Probability = 0.1
    storage: Storage = "fp32"

    def build(self, place: Place) -> MomentumEF21:
        return MomentumEF21(self, place)


class EF21PP(FeedbackSettings):
    """`feedback: ef21_pp`: EF21 in which each rank takes part in a step with a given probability.

    Fatkhullin, Sokolov, Gorbunov, Li, Richtárik (2021), arXiv 2110.03294. Present ranks do as in EF21; an absent one
    sends nothing, its c = 0 and its g_i stays, and the others go on using it as part of g. Who is present is drawn
    from the run's seed and the step, so that all ranks know it without a message.
    Memory: as EF21.

    Args:
        participation: the probability, of all ranks or of each.
    """

    kind: Literal["ef21_pp"] = "ef21_pp"
    participation: Probability | Annotated[tuple[Probability, ...], FROM_LIST] = 0.5

    def build(self, place: Place) -> PartialEF21:
        return PartialEF21(self, place)


class MomentumEF21(EF21Feedback):
    """The memory of EF21-SGDM: v (momentum) besides that of EF21."""

    kind = "ef21_sgdm"

    def __init__(self, settings: EF21SGDM, place: Place) -> None:
        self._eta = settings.eta
        self._momentum = self._buffered(settings.storage, "momentum")
        super().__init__(place, momentum=self._momentum)

    def before(self, name: str, gradient: Tensor) -> Tensor:
        self._take_in(name, gradient)
        following = self._momentum.next(name, gradient)
        if name in self._momentum:
            torch.lerp(self._momentum.now(name, gradient), gradient, self._eta, out=following)
        else:
            following.copy_(gradient)
        torch.sub(following, self._own.now(name, gradient), out=gradient)
        self._momentum.seal(name)
        return gradient


class PartialEF21(EF21Feedback):
    """The memory of EF21-PP, and the draw of who takes part."""

    kind = "ef21_pp"

    def __init__(self, settings: EF21PP, place: Place) -> None:
        each = settings.participation
        if isinstance(each, tuple) and len(each) != place.size:
            raise ValueError(
                f"feedback.participation: {len(each)} probabilities for {place.size} ranks; give one for each rank, or "
                "one number for all"
            )
        super().__init__(place)
        self._participation = torch.tensor(each if isinstance(each, tuple) else [each] * place.size)
        self._present = [True] * place.size

    def begin_step(self, step: int, scale: float = 1.0) -> None:
        super().begin_step(step, scale)
        uniform = torch.rand(self._place.size, generator=Draw(self._place.seed, step, self.kind, 0).shared())
        self._present = (uniform < self._participation).tolist()

    def weights(self, size: int) -> Sequence[float]:
        assert size == self._place.size
        return [float(present) for present in self._present]

    def before(self, name: str, gradient: Tensor) -> Tensor:
        return super().before(name, gradient) if self._present[self._place.rank] else gradient

    def after(self, name: str, sent: Decoded | None, mean: Tensor) -> None:
        if self._present[self._place.rank]:
            super().after(name, sent, mean)
        else:
            self._advance_mean(name, mean)

    def metrics(self) -> dict[str, float]:
        return {**super().metrics(), "present_ranks": float(sum(self._present))}

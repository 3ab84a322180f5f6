"""EF21: each rank compresses the difference between its gradient and what the others already know of it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from thinwire.comm.compress.decoded import Decoded
from thinwire.comm.compress.feedback.protocol import FeedbackSettings, Place
from thinwire.comm.compress.feedback.rank_memory import RankMemory
from thinwire.comm.compress.feedback.store import Pair, Store, Sum


class EF21(FeedbackSettings):
    """`feedback: ef21`: compress the difference to the last estimate of the gradient.

    Richtárik, Sokolov, Fatkhullin (2021), arXiv 2106.05203. Each rank keeps g_i, and all keep g = mean g_i:

        c = C(grad f_i(x) - g_i);  g_i <- g_i + c;  g <- g + mean c;  x <- x - lr g

    g_i starts at zero. The paper starts it at the first gradient: a door that sends step 0 uncompressed does the
    same. With the noisy gradients of small batches it stalls at a noise floor: take EF21SGDM there.
    Where the mean is compressed too (two_shot), its error is kept at the owners, so that this becomes EF21BC.
    Memory: 12 bytes per parameter (g_i once, g in two buffers). There is no 8-bit storage: an error of rounding in g_i
    would stay in g for ever, as nothing corrects their difference.
    """

    kind: Literal["ef21"] = "ef21"

    def build(self, place: Place) -> EF21Feedback:
        return EF21Feedback(place)


class EF21BC(FeedbackSettings):
    """`feedback: ef21_bc`: EF21 in both directions.

    Fatkhullin, Sokolov, Gorbunov, Li, Richtárik (2021), arXiv 2110.03294. Ranks as in EF21, with g~_i; of the mean only
    b = C(mean g~_i - g) is sent back, and every rank does g <- g + b. The collective keeps mean g~_i - g, slice by
    slice at the owners: mean = b when it is TwoShot(server_error=True), which this kind asks for.
    """

    kind: Literal["ef21_bc"] = "ef21_bc"

    def build(self, place: Place) -> EF21Feedback:
        return BidirectionalEF21(place)


class EF21Feedback(RankMemory):
    """The memory of EF21: g_i of this rank (own), and g (mean)."""

    kind = "ef21"
    sums_means = True
    same_on_all_ranks = frozenset({"mean"})
    gives_back_to = ("own", -1.0)

    def __init__(self, place: Place, **more: Store) -> None:
        self._own, self._mean = Sum(), Pair()
        super().__init__(place, own=self._own, mean=self._mean, **more)

    def before(self, name: str, gradient: Tensor) -> Tensor:
        return self._take_in(name, gradient).sub_(self._own.now(name, gradient))

    def after(self, name: str, sent: Decoded | None, mean: Tensor) -> None:
        assert sent is not None
        self._own.stage(name, sent, mean)
        self._advance_mean(name, mean)

    def _advance_mean(self, name: str, mean: Tensor) -> None:
        """g <- g + mean, staged; mean <- g, with the loss scale."""
        following = self._mean.next(name, mean)
        torch.add(self._mean.now(name, mean), mean, out=following)
        self._mean.seal(name)
        torch.mul(following, self._scale, out=mean)


class BidirectionalEF21(EF21Feedback):
    """The ranks' half of EF21-BC."""

    kind = "ef21_bc"
    server_error = True

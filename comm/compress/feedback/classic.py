"""Classic error feedback: what was not sent is added to the next gradient; and no feedback at all."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.decoded import Decoded
from thinwire.comm.compress.feedback.protocol import FeedbackSettings, Place
from thinwire.comm.compress.feedback.rank_memory import RankMemory
from thinwire.comm.compress.feedback.store import Storage


class NoFeedback(FeedbackSettings):
    """`feedback: none`: the gradient itself is compressed, and what is not sent is lost.

    For unbiased compressors (stochastic rounding, rescaled random places) or none.
    """

    kind: Literal["none"] = "none"

    def build(self, place: Place) -> PlainMean:
        return PlainMean(place)


class EF(FeedbackSettings):
    """`feedback: ef`: what was not sent is kept and added to the next gradient.

    Karimireddy, Rebjock, Stich, Jaggi (2019), arXiv 1901.09847. On each rank, with step size lr_t, gradient g_t:

        units "update":   c = lr_t g_t + e;  send C(c);  e <- c - C(c);  x <- x - mean C(c)        (the paper's)
        units "gradient": c = g_t + e;       send C(c);  e <- c - C(c);  x <- x - lr_t mean C(c)

    The same while lr is constant. When it falls, "update" still applies what is left over at the old lr, and "gradient"
    at the new one. In "update" the door's optimizer must be plain SGD: mean C(c) / lr_t is what it gets.
    Memory: 8 bytes per parameter (two buffers) or, with storage "int8", 2.03.

    Args:
        storage: "int8" keeps e in blocks of 256 with one scale, stochastically rounded, so without bias.
        decay: multiplies e before it is added; below 1 (SparseLoCo, Sarfi et al. 2025, 2508.15706: 0.95) old errors
            are forgotten little by little, and what was given and what was sent no longer have equal sums.
    """

    kind: Literal["ef"] = "ef"
    units: Literal["gradient", "update"] = "gradient"
    storage: Storage = "fp32"
    decay: float = Field(1.0, gt=0, le=1)

    def build(self, place: Place) -> ErrorFeedback:
        return ErrorFeedback(self, place)


class PlainMean(RankMemory):
    """No state: compresses the gradient, hands on the mean."""

    kind = "none"

    def before(self, name: str, gradient: Tensor) -> Tensor:
        return gradient

    def after(self, name: str, sent: Decoded | None, mean: Tensor) -> None:
        pass


class ErrorFeedback(RankMemory):
    """The memory of EF; the addition and the new error are the encoder's (Compressor.encode_with_feedback)."""

    kind = "ef"
    gives_back_to = ("error", 1.0)

    def __init__(self, settings: EF, place: Place) -> None:
        if settings.units == "update" and place.learning_rate is None:
            raise ValueError(
                "feedback.units: 'update' keeps the error times the learning rate, which this door does not know; "
                "use units: gradient"
            )
        self._errors = self._buffered(settings.storage, "error")
        self._in_updates = settings.units == "update"
        self._decay = settings.decay
        super().__init__(place, error=self._errors)

    def memories(self, name: str, gradient: Tensor) -> tuple[Tensor, Tensor]:
        self._take_in(name, gradient)
        return self._errors.now(name, gradient), self._errors.next(name, gradient)

    def after(self, name: str, sent: Decoded | None, mean: Tensor) -> None:
        if self._decay != 1.0:
            self._errors.next(name, mean).mul_(self._decay)
        self._errors.seal(name)
        factor = self._factor(name)
        if factor != 1.0:
            mean.mul_(1.0 / factor)

    def _factor(self, name: str) -> float:
        if not self._in_updates:
            return super()._factor(name)
        assert self._place.learning_rate is not None
        learning_rate = self._place.learning_rate(name)
        if not learning_rate > 0.0:
            raise ValueError(
                f"feedback.units: 'update' divides by the learning rate, but that of {name} is {learning_rate} in step "
                f"{self._step}; start the schedule above zero, or use units: gradient"
            )
        return learning_rate * super()._factor(name)

    def _identity(self) -> dict[str, Any]:
        return {**super()._identity(), "units": "update" if self._in_updates else "gradient"}

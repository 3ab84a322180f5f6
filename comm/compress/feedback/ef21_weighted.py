"""EF21-W: ranks whose gradient changes fast count for more, which allows a larger step size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from thinwire.comm.compress.feedback import theory
from thinwire.comm.compress.feedback.ef21 import EF21Feedback
from thinwire.comm.compress.feedback.protocol import FeedbackSettings, Place
from thinwire.comm.settings import FROM_LIST

_CLIP = 10.0  # estimated weights stay within [1 / (10 n), 10 / n]
Positive = Annotated[float, Field(gt=0.0)]


class EF21W(FeedbackSettings):
    """`feedback: {kind: ef21_w, smoothness: [...]}`: EF21 with weights w_i = L_i / sum L_j.

    Richtárik, Gasanov, Burlachenko (2024), arXiv 2402.10774. Rank i of n keeps g_i, and all keep g = sum w_i g_i:

        c = C(grad f_i(x) / (n w_i) - g_i);  g_i <- g_i + c;  g <- g + sum w_i c_i;  x <- x - lr g

    proven for lr <= 1 / (L + L_AM xi(alpha)), where EF21's first proof had L_QM, which is larger: see theory.
    For compressors with C(t x) = t C(x) it is EF21 itself, and what is gained is that step size; metrics() gives both.
    Memory: as EF21.

    Args:
        smoothness: L_i by rank, in any common unit. If not given, the weights are 1/n, as in EF21, until the handle's
            weigh_by() has exchanged what a SmoothnessEstimate measures on each rank.
        contraction: the compressor's alpha; metrics() then gives step sizes, with L_AM for L where that is not known.
        smoothness_of_mean: L.
    """

    kind: Literal["ef21_w"] = "ef21_w"
    smoothness: Annotated[tuple[Positive, ...], FROM_LIST] | None = None
    contraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    smoothness_of_mean: Positive | None = None

    def build(self, place: Place) -> WeightedEF21:
        return WeightedEF21(self, place)


class WeightedEF21(EF21Feedback):
    """The memory of EF21-W, and the weights."""

    kind = "ef21_w"

    def __init__(self, settings: EF21W, place: Place) -> None:
        super().__init__(place)
        self._settings = settings
        self._smoothness: Sequence[float] = (1.0,) * place.size
        self._weights = theory.weights(self._smoothness)
        if settings.smoothness is not None:
            self._set(settings.smoothness, theory.weights(settings.smoothness), "feedback.smoothness")

    def set_smoothness(self, smoothness: Sequence[float]) -> None:
        """Weigh by estimates from now on: w_i = L_i / sum L_j, but not outside [0.1 / n, 10 / n].

        Between steps, on every rank, with the same numbers. g_i is rescaled so that sum w_i g_i stays.

        Raises:
            ValueError: not one number for each rank, or not usable ones.
        """
        lower, upper = 1 / (_CLIP * self._place.size), _CLIP / self._place.size
        self._set(smoothness, [min(max(w, lower), upper) for w in theory.weights(smoothness)], "smoothness")

    def weights(self, size: int) -> Sequence[float]:
        assert size == self._place.size
        return [size * weight for weight in self._weights]

    def metrics(self) -> dict[str, float]:
        quadratic, arithmetic = theory.quadratic_mean(self._smoothness), theory.arithmetic_mean(self._smoothness)
        values = {
            **super().metrics(),
            "weight": self._weights[self._place.rank],
            "l_qm_over_l_am": quadratic / arithmetic,
        }
        if self._settings.contraction is not None:
            L = self._settings.smoothness_of_mean or arithmetic
            values["step_size"] = theory.step_size(L, self._settings.contraction, arithmetic)
            values["step_size_ef21"] = theory.step_size(L, self._settings.contraction, quadratic)
        return values

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "smoothness": list(self._smoothness), "weights": list(self._weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._smoothness, self._weights = list(state["smoothness"]), list(state["weights"])
        if self._settings.smoothness is not None:
            self._set(self._settings.smoothness, theory.weights(self._settings.smoothness), "feedback.smoothness")

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**super().merge(states), "smoothness": list(self._smoothness), "weights": list(self._weights)}

    def _mean_weights(self, states: Sequence[Mapping[str, Any]]) -> Sequence[float]:
        # Every new rank gets the same g_i, of which sum w_i g_i must be what it was.
        return [weight / sum(self._weights) for weight in states[0]["weights"]]

    def _factor(self, name: str) -> float:
        return super()._factor(name) / (self._place.size * self._weights[self._place.rank])

    def _set(self, smoothness: Sequence[float], weights: list[float], setting: str) -> None:
        if len(smoothness) != self._place.size:
            raise ValueError(
                f"{setting}: {len(smoothness)} values for {self._place.size} ranks; give one for each rank"
            )
        rank = self._place.rank
        if weights[rank] != self._weights[rank]:
            self._own.scale(self._weights[rank] / weights[rank])
        self._smoothness, self._weights = list(smoothness), weights


class SmoothnessEstimate:
    """This rank's L_i from gradients of one and the same batch at consecutive iterates.

    L <- max(decay * L, ||grad(x') - grad(x)|| / ||x' - x||). A gradient of another batch would measure noise.
    Keeps a copy of both: 8 bytes per parameter.

    Args:
        decay: 1 keeps the largest ever seen; less forgets.
    """

    def __init__(self, decay: float = 1.0) -> None:
        self.smoothness = 0.0
        self._decay = decay
        self._last: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None

    @torch.no_grad()
    def observe(self, iterate: Mapping[str, Tensor], gradient: Mapping[str, Tensor]) -> float:
        """Take in x and grad f_i(x), by parameter name; returns the estimate, 0 before the second call.

        What is not finite, or did not move, changes nothing.
        """
        if self._last is not None:
            moved = _distance(iterate, self._last[0])
            ratio = _distance(gradient, self._last[1]) / moved if moved > 0.0 else math.nan
            if math.isfinite(ratio):
                self.smoothness = max(self._decay * self.smoothness, ratio)
        self._last = (
            {name: value.detach().clone() for name, value in iterate.items()},
            {name: value.detach().clone() for name, value in gradient.items()},
        )
        return self.smoothness


def _distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(value - b[name])) ** 2 for name, value in a.items()))

"""Loss-free balancing: a bias per expert, added to the scores by which tokens select, and never to their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from thinwire.comm.balance.columns import Columns
from thinwire.comm.balance.margins import cutoff_shift
from thinwire.comm.settings import Settings


class SignBiasSettings(Settings):
    """`bias: sign`: b_i <- b_i + rate * sign(mean_j c_j - c_i) after each step.

    Wang et al. 2024 (2408.15664); rate: 1e-3 there.
    """

    kind: Literal["sign"] = "sign"
    rate: float = Field(1e-3, gt=0)


class QuantileBiasSettings(Settings):
    """`bias: quantile`: after each step, b becomes what would have given every expert its share of that step's tokens.

    As Megatron-Core and torchtitan do after the report of Kimi K3 (2026). Where theta_t is the (k+1)-th largest of a
    token's biased scores, expert i is selected where b_i > theta_t - s_ti; so b_i goes to the k/E quantile over tokens
    of theta_t - s_ti. It is read from histograms, which travel with the counts. Theirs have about 1000 equal bins over
    the whole range; ours have few bins, which are fine about the present b_i and coarse far from it.

    rate: how much of the way to go.
    bins: of each expert's histogram; each costs 4 bytes per expert in every message, so modes stale and ema, with one
      message per step, suit it best.
    """

    kind: Literal["quantile"] = "quantile"
    rate: float = Field(1.0, gt=0, le=1)
    bins: int = Field(64, ge=8, le=4096, multiple_of=2)


def _from_name(given: Any) -> Any:
    return {"kind": given} if isinstance(given, str) else given


BiasSettings: TypeAlias = Annotated[
    SignBiasSettings | QuantileBiasSettings, Field(discriminator="kind"), BeforeValidator(_from_name)
]
"""Settings of any bias, by `kind`; a string is the kind with its defaults."""


class SelectionBias:
    """The biases of all layers: fp64, the same on every rank, since all update them by the same totals.

    Their mean is taken off after each update: selection is the same with and without it, and it would drift.

    Attributes: asked, names of the layers whose router has asked for its bias; steps, whose counts are in the biases.
    """

    def __init__(self, settings: SignBiasSettings | QuantileBiasSettings, columns: Columns, top_k: int) -> None:
        if isinstance(settings, QuantileBiasSettings) and top_k >= columns.num_experts:
            raise ValueError(
                f"bias: quantile, but each token selects all {top_k} experts, so that nothing is left to balance; "
                "lower top_k, or remove bias"
            )
        self.asked: set[str] = set()
        self.steps = 0
        self._settings = settings
        self._columns = columns
        self._top_k = top_k
        self._values: Tensor | None = None  # (layers, num_experts)

    def of(self, layer: int | None, like: Tensor) -> Tensor:
        """(num_experts,) fp32 on the device of `like`; zeros before the first update."""
        if self._values is None or layer is None:
            return like.new_zeros(self._columns.num_experts, dtype=torch.float32)
        return self._values[layer].to(device=like.device, dtype=torch.float32)

    def update(self, rows: Tensor) -> None:
        """After a step.

        Args:
            rows: (layers, columns.width), what all ranks have counted in it.
        """
        settings, columns = self._settings, self._columns
        if isinstance(settings, SignBiasSettings):
            loads = columns.loads(rows).long()
            # Mean minus count, times E: in integers, so that a count that is the mean moves nothing.
            shift = (loads.sum(-1, keepdim=True) - columns.num_experts * loads).sign().double()
        else:
            shift = cutoff_shift(columns.margins(rows), self._top_k / columns.num_experts)
        values = settings.rate * shift
        if self._values is not None:
            values = self._values.to(values.device) + values
        self._values = values - values.mean(-1, keepdim=True)

    @property
    def range(self) -> float:
        """The largest difference between the biases of two experts of a layer."""
        return 0.0 if self._values is None else float((self._values.amax(-1) - self._values.amin(-1)).max())

    def state_dict(self) -> dict[str, Any]:
        """The biases."""
        return {"values": self._values}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Of any number of ranks, which all had the same."""
        self._values = state["values"]

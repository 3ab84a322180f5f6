"""What a load-balancing loss is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from thinwire.comm.balance.bias import BiasSettings
from thinwire.comm.gossip.graphs import EachGraph, from_name
from thinwire.comm.settings import Settings

Scope = Literal["micro", "node", "global"]
ModeName = Literal["sync", "late", "carry", "stale", "ema", "hier", "gossip"]


class BalanceSettings(Settings):
    """The load-balancing loss, a * E * sum_i f_i P_i in every layer, and what may stand beside it.

    coef: a; summed over layers. Hugging Face's router_aux_loss_coef corresponds to a = coef * top_k / layers.
    scope: what f is counted over: this rank's micro-batch, the ranks of its node, or the whole batch.
    mode: when f is known; null = stale. See LoadBalance.
    decay: modes ema and gossip: of the moving average of f; gossip may have none.
    graph: mode gossip: who tells whom, as `graph:` of gossip but undirected; null = ring.
    micro_coef: of the same loss over the micro-batch; 0.01 * coef keeps single micro-batches from too uneven loads.
    z_coef: of mean_t (logsumexp z_t)^2 (Zoph et al. 2022, 2202.08906), which keeps logits small; usually 1e-3.
    bias: sign or quantile: loss-free balancing by biases of the scores, from the same counts; coef may then be 0.
    """

    coef: float = Field(ge=0)
    scope: Scope = "global"
    mode: ModeName | None = None
    decay: float | None = Field(None, gt=0, lt=1)
    graph: Annotated[EachGraph, Field(discriminator="kind"), BeforeValidator(from_name)] | None = None
    micro_coef: float = Field(0.0, ge=0)
    z_coef: float = Field(0.0, ge=0)
    bias: BiasSettings | None = None

    @model_validator(mode="after")
    def _mode_fits_scope(self) -> BalanceSettings:
        if self.scope == "micro" and self.mode is not None:
            raise ValueError(f"mode: {self.mode}, but with scope: micro nothing is waited for; remove mode")
        if self.scope == "node" and self.mode in ("hier", "gossip"):
            raise ValueError(f"mode: {self.mode} is for scope: global; give another mode, or that scope")
        if self.scope == "micro" and self.micro_coef:
            raise ValueError("micro_coef: with scope: micro it is the same loss again; raise coef instead")
        if self.bias is not None and (self.scope != "global" or self.mode == "gossip"):
            here = "mode: gossip" if self.scope == "global" else f"scope: {self.scope}"
            raise ValueError(
                f"bias: {self.bias.kind} follows the counts of the whole batch, which no rank knows with {here}; give "
                "scope: global and another mode, or remove bias"
            )
        if self.mode == "ema" if self.decay is None else self.mode not in ("ema", "gossip"):
            raise ValueError(
                "decay: goes with mode: ema, and with no other but gossip, which may do without; 0.9 is usual"
            )
        if self.graph is not None and self.mode != "gossip":
            raise ValueError(f"graph: goes with mode: gossip, not with {self.mode or 'none given'}; remove it")
        return self

    @property
    def timing(self) -> ModeName:
        """The mode, where scope is not micro."""
        return self.mode or "stale"

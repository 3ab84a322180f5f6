"""`balance:` of a training run: the load-balancing loss of a mixture of experts, beside whatever method trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, model_validator
from torch import nn

from thinwire.comm.balance.balance import LoadBalance
from thinwire.comm.balance.settings import BalanceSettings
from thinwire.dist.mesh import Mesh
from thinwire.dist.models.moe import MoEGPT, MoESettings
from thinwire.dist.world import World

if TYPE_CHECKING:
    from thinwire.dist.config import RunConfig

NEAR = "node"


class BalanceRunSettings(BalanceSettings):
    """BalanceSettings, and what a run adds.

    within: the level of the machine whose ranks scope node counts, and that mode hier does not wait beyond; null =
      node.
    """

    within: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] | None = None

    @model_validator(mode="after")
    def _within_has_a_use(self) -> BalanceRunSettings:
        if self.within is not None and not self.is_near:
            raise ValueError(
                f"within: {self.within}, but only scope: node and mode: hier know a level between one rank and all; "
                "remove it, or give one of them"
            )
        return self

    @property
    def is_near(self) -> bool:
        """Whether a level of the machine matters."""
        return self.scope == "node" or self.mode == "hier"


def check_balance(config: RunConfig) -> None:
    """Does the rest of the run leave the loss something to do?

    Raises:
        ValueError: it does not.
    """
    settings = config.balance
    if settings is None:
        return
    if not isinstance(config.model, MoESettings):
        raise ValueError(
            f"balance: is given, but model.kind: {config.model.kind} has no routers that a run could balance; give "
            "model.kind=moe, or remove it"
        )
    if config.method.kind == "onebyte":
        raise ValueError(
            "balance: is given, but method onebyte has no backward pass, through which alone the loss pulls; remove it"
        )
    if config.method.kind == "gossip" and settings.scope != "micro":
        raise ValueError(
            f"balance.scope: {settings.scope}, but under method gossip each machine goes at a pace of its own, so that "
            "they have no batch in common; give balance.scope=micro"
        )


class RunBalance:
    """The loss in a run: a LoadBalance on a queue of its own, told where each step begins. Collective.

    With scope micro, which sends nothing, it needs no queue.

    Args:
        config: with balance.
        model: whose routers it enters, before an engine wraps it.
        micro_batches: of each step, on each rank.
    Raises:
        ValueError: a setting does not fit this world.

    Attributes: handle, the LoadBalance. forwards_first: whether all forward passes of a step must come before the first
    backward pass, for mode late to be what it says.
    """

    def __init__(self, config: RunConfig, model: nn.Module, world: World, *, micro_batches: int) -> None:
        settings, shape = config.balance, config.model
        assert settings is not None
        assert isinstance(shape, MoESettings), "RunConfig refuses other models"
        assert isinstance(model, MoEGPT)
        self.forwards_first = settings.mode == "late" and micro_batches > 1
        if self.forwards_first and config.engine.kind != "ddp":
            raise ValueError(
                f"balance.mode: late with {micro_batches} micro-batches keeps the activations of all of them, which "
                f"engine {config.engine.kind} cannot; give train.micro_batch=auto, or balance.mode=carry or stale"
            )
        inner = _near_ranks(settings, world.mesh) if settings.is_near else None
        self._queue = None if settings.scope == "micro" else world.queue.beside("balance")
        self.handle = LoadBalance(
            num_experts=shape.experts,
            top_k=shape.top_k,
            score=shape.gate,
            layers=[f"blocks.{layer}" for layer in range(shape.layers) if shape.has_experts(layer)],
            micro_batches=micro_batches,
            inner=inner,
            queue=self._queue or world.queue,
            **{name: getattr(settings, name) for name in BalanceSettings.model_fields},
        )
        model.balance_with(self.handle)

    @property
    def exposed_s(self) -> float:
        """Seconds for which somebody waited for counts."""
        return self._queue.exposed_s if self._queue else 0.0

    def describe(self) -> str:
        """One line."""
        return self.handle.describe()

    def begin_step(self) -> None:
        """The next forward pass is the first of a step."""
        self.handle.begin_step()

    def close(self) -> None:
        """Wait for the last message, which may tell of a fault, and end the thread. All ranks have come to the end."""
        self.handle.finish()
        if self._queue:
            self._queue.close()


def _near_ranks(settings: BalanceRunSettings, mesh: Mesh) -> Sequence[Sequence[int]]:
    """The groups of the level that `within` names."""
    name = settings.within or NEAR
    try:
        return [sorted(group) for group in mesh.groups(name)]
    except ValueError as error:
        raise ValueError(f"balance.within: {error}; name one of them, or give mesh.levels") from None

"""A GPT with mixtures of experts in place of its MLPs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from thinwire.comm.balance.balance import LoadBalance
from thinwire.dist.models.experts import Experts
from thinwire.dist.models.gpt import GPT, MLP, GPTSettings
from thinwire.dist.models.router import Gate, Router


class MoESettings(GPTSettings):
    """Shape of a GPT with experts: all settings of a GPT, and these.

    experts: routed ones in each layer. top_k: how many of them a token selects.
    expert_width: numbers between the two (swiglu: three) matrices of an expert.
    shared_experts: further ones, to which every token goes.
    gate: scores of the experts are the softmax over all of them, or the sigmoid of each.
    renormalise: the weights of a token's selected experts sum to 1. Without it they are the scores themselves.
    dense_every: of every so many layers the last one has an MLP as in a GPT; 0 = no layer has.
    expert_parallel: level of the mesh, such as node, over whose ranks the routed experts are spread; tokens travel to
      them. null = every rank has them all. With method allreduce and engine ddp.
    """

    kind: Literal["moe"] = "moe"  # type: ignore[assignment]
    experts: int = Field(gt=1)
    top_k: int = Field(gt=0)
    expert_width: int = Field(gt=0)
    shared_experts: int = Field(0, ge=0)
    gate: Gate = "softmax"
    renormalise: bool = True
    dense_every: int = Field(0, ge=0)
    expert_parallel: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")] | None = None

    @model_validator(mode="after")
    def _can_choose(self) -> MoESettings:
        if self.top_k > self.experts:
            raise ValueError(
                f"top_k: {self.top_k} is more than the {self.experts} experts; give at most {self.experts}"
            )
        if self.top_k == 1 and self.renormalise:
            raise ValueError(
                "renormalise: true makes the weight of the one expert that top_k: 1 selects 1 whatever the router "
                "says, so that it learns nothing; give renormalise: false, or top_k: 2"
            )
        if self.dense_every == 1:
            raise ValueError("dense_every: 1 leaves no layer with experts; give 2 or more, or model.kind: gpt")
        return self

    def has_experts(self, layer: int) -> bool:
        """Whether this layer has experts; the first one is 0, and always has."""
        return not self.dense_every or (layer + 1) % self.dense_every != 0


class MoEGPT(GPT):
    """A GPT in which each position's MLP is a mixture of experts.

    Shazeer et al. 2017 (1701.06538), with shared experts beside the routed ones (Dai et al. 2024, DeepSeekMoE,
    2401.06066): per layer x += attention(norm(x)), x += shared(norm(x)) + sum of the selected experts; see Experts.

    Args:
        settings: the shape.
        vocab: number of token ids, from the tokenizer.

    Attributes: moe_layers, those with experts, in order; each has a router.
    """

    def __init__(self, settings: MoESettings, vocab: int) -> None:
        super().__init__(settings, vocab)
        for number, block in enumerate(self.blocks):
            if settings.has_experts(number):
                block.mlp = MoE(settings)

    @property
    def moe_layers(self) -> list[MoE]:
        """In order."""
        return [block.mlp for block in self.blocks if isinstance(block.mlp, MoE)]

    def balance_with(self, balance: LoadBalance | None) -> None:
        """Let this count and balance the loads of all layers, named "blocks.0" and so on; None = nothing does.

        Routers do not call it in eval mode.

        Raises:
            ValueError: it is for other numbers of experts.
        """
        for number, block in enumerate(self.blocks):
            if isinstance(block.mlp, MoE):
                block.mlp.router.balance_with(balance, f"blocks.{number}")


class MoE(nn.Module):
    """Shared experts, and a router with its experts."""

    def __init__(self, settings: MoESettings) -> None:
        super().__init__()
        self.router = Router(
            settings.width, settings.experts, settings.top_k, gate=settings.gate, renormalise=settings.renormalise
        )
        gated = settings.mlp == "swiglu"
        self.experts = Experts(settings.experts, settings.width, settings.expert_width, gated=gated)
        self.shared = (
            MLP(settings, settings.shared_experts * settings.expert_width) if settings.shared_experts else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (batch, length, width)."""
        tokens = x.flatten(0, -2)
        out: Tensor = self.experts(tokens, self.router(tokens)).view(x.shape)
        return out if self.shared is None else out + self.shared(x)

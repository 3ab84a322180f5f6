"""How LoadBalance enters a model of Hugging Face's transformers: by hooks on its routers.

Written against the routers of transformers 5, which return (logits, weights, selected experts).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from thinwire.comm.balance.balance import LoadBalance

# The padding mask rides to the decoder layers under this name: so a recomputed layer sees the mask of its own
# micro-batch, whichever one the model was called with last.
_MASK = "thinwire_valid_mask"
_OWN_LOSS = ("router_aux_loss_coef", "aux_loss_coef")

_balanced: WeakSet[nn.Module] = WeakSet()


def balance_hf(model: nn.Module, balance: LoadBalance) -> BalancedModel:
    """Balance the experts of a Hugging Face model: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE and others like them.

    Tokens where attention_mask is 0 are padding, and have no part. The model's own auxiliary loss, which knows one
    micro-batch and pools all layers, has the weight 0 from then on; output_router_logits still shows its value. Its
    router_aux_loss_coef corresponds to LoadBalance's coef = router_aux_loss_coef * num_experts_per_tok / MoE layers.
    In eval mode nothing is counted.

    Args:
        model: that model, or a module around it (of peft, say), before DDP, fully_shard() or torch.compile().
        balance: with this model's num_experts and top_k; layers are named by the routers' paths.
    Returns: remove() takes the hooks off.
    Raises:
        ValueError: there are no such routers, or they are balanced already. In a forward pass: attention_mask is not
            (batch, tokens), or the model cannot be balanced from outside; then call LoadBalance in the router itself.

    Example:
        config = model.config
        coef = config.router_aux_loss_coef * config.num_experts_per_tok / config.num_hidden_layers
        balance = thinwire.LoadBalance(
            num_experts=config.num_local_experts, top_k=config.num_experts_per_tok, coef=coef
        )
        thinwire.balance_hf(model, balance)
    """
    kinds = {_router_class(module) for module in model.modules()} - {None}
    routers = {path: module for path, module in model.named_modules() if type(module) in kinds}
    if not routers:
        raise ValueError(
            f"model: found no routers in {type(model).__name__}; allowed: mixture-of-experts models of transformers 5 "
            "whose routers return (logits, weights, selected). In another model call LoadBalance in each router"
        )
    if twice := [path for path, module in routers.items() if module in _balanced]:
        raise ValueError(f"model: {twice[0]} is balanced already; remove() the first balance_hf(), or call it once")
    return BalancedModel(model, routers, balance)


class BalancedModel:
    """The hooks in one model, until remove()."""

    def __init__(self, model: nn.Module, routers: Mapping[str, nn.Module], balance: LoadBalance) -> None:
        self._balance = balance
        self._routers = list(routers.values())
        self._masks: dict[str, Tensor | None] = {}  # by decoder layer
        self._hooks: list[Any] = []
        homes = {path: _decoder_layer(model, path) for path in routers}
        self._own_losses = [
            (module, name, getattr(module, name))
            for module in model.modules()
            for name in _OWN_LOSS
            if isinstance(getattr(module, name, None), int | float)
        ]
        for module, name, _ in self._own_losses:
            setattr(module, name, 0.0)
        for stack in {path.rpartition(".")[0] for path in homes.values()}:
            decoder = model.get_submodule(stack.rpartition(".")[0])
            self._hooks.append(decoder.register_forward_pre_hook(self._send(decoder), with_kwargs=True))
            for number, layer in model.get_submodule(stack).named_children():
                for part in layer.children():
                    self._hooks.append(
                        part.register_forward_pre_hook(self._receive(f"{stack}.{number}"), with_kwargs=True)
                    )
        for path, router in routers.items():
            self._hooks.append(router.register_forward_hook(self._enter(path, homes[path])))
            _balanced.add(router)
        balance.watch(model)

    def remove(self) -> None:
        """Leave the model as it was, its own auxiliary loss included."""
        for hook in self._hooks:
            hook.remove()
        for module, name, value in self._own_losses:
            setattr(module, name, value)
        for router in self._routers:
            _balanced.discard(router)

    def _send(self, decoder: nn.Module) -> Any:
        place = list(inspect.signature(decoder.forward).parameters).index("attention_mask")

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = args[place] if len(args) > place else kwargs.get("attention_mask")
            if module.training and kwargs.get("output_router_logits") and not self._own_losses:
                raise ValueError(
                    "output_router_logits: true, with which this model adds an auxiliary loss of its own; set it to "
                    "false in the model's config, and leave it out of calls"
                )
            return args, {**kwargs, _MASK: mask}

        return hook

    def _receive(self, layer: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
            if _MASK not in kwargs:
                return None
            self._masks[layer] = kwargs.pop(_MASK)
            return args, kwargs

        return hook

    def _enter(self, path: str, layer: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> tuple[Tensor, Tensor, Tensor] | None:
            if not (isinstance(output, tuple) and len(output) == 3 and layer in self._masks):
                raise ValueError(
                    f"model: {path} does not return (logits, weights, selected), or its layer does not hand keyword "
                    "arguments on to its parts; call LoadBalance in the router itself"
                )
            logits, weights, selected = output
            valid = _valid_tokens(self._masks[layer], len(logits))
            balanced = self._balance(path, logits, selected, valid)
            return None if balanced is logits else (logits, tie(weights, balanced), selected)

        return hook


def tie(weights: Tensor, logits: Tensor) -> Tensor:
    """The weights, through whose backward pass that of the logits runs too, though nothing else is made of them."""
    tied: Tensor = _Tie.apply(weights, logits)  # type: ignore[no-untyped-call]
    return tied


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, logits: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = logits.shape, logits.dtype
        # The weights, but made of the logits; and below zero, but made of the gradient: what seems to be no part of a
        # pass, torch.compile drops or moves to the other one.
        return torch.where(logits[..., :1].isnan(), torch.nan, weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        zero = (0 * gradient.sum(-1, keepdim=True)).to(ctx.dtype)
        return gradient, zero.expand(ctx.shape)


def _router_class(module: nn.Module) -> type | None:
    """The class of the routers in a model, which transformers names in order to record their logits."""
    recorder = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits")
    return getattr(recorder, "target_class", None) if getattr(recorder, "index", None) == 0 else None


def _decoder_layer(model: nn.Module, router: str) -> str:
    """The path of the outermost numbered layer that a router is in."""
    names = router.split(".")
    for depth in range(1, len(names)):
        if isinstance(model.get_submodule(".".join(names[:depth])), nn.ModuleList):
            return ".".join(names[: depth + 1])
    raise ValueError(f"model: {router} is in no nn.ModuleList of layers; call LoadBalance in the router itself")


def _valid_tokens(mask: Tensor | None, tokens: int) -> Tensor | None:
    if mask is None:
        return None
    rows, columns = mask.shape if mask.dim() == 2 else (0, 0)
    if not rows or tokens % rows or columns < tokens // rows:
        raise ValueError(
            f"attention_mask: of shape {tuple(mask.shape)} for {tokens} tokens; allowed: (batch, tokens), 0 where a "
            "token is padding, or none"
        )
    return mask[:, columns - tokens // rows :].reshape(-1) != 0

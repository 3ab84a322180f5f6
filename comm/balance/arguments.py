"""What LoadBalance is told, checked before anything is made of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from thinwire.kernels.router_gradient import Score


def check_router(num_experts: int, top_k: int, score: Score) -> None:
    """Of the routers.

    Raises:
        ValueError: there are no such ones.
    """
    if num_experts < 1:
        raise ValueError(f"num_experts: {num_experts}; allowed: 1 or more, the outputs of each router")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k: {top_k}; allowed: 1 to num_experts, {num_experts}: the experts that a token selects")
    if score not in get_args(Score):
        raise ValueError(f"score: {score!r} is not known; allowed: {' or '.join(get_args(Score))}, as the gate has it")


def check_step(micro_batches: int | None, valid_tokens: int | None = None) -> None:
    """Of a step.

    Raises:
        ValueError: there are no such ones.
    """
    if micro_batches is not None and micro_batches < 1:
        raise ValueError(f"micro_batches: {micro_batches}; allowed: 1 or more, the forward passes of a step")
    if valid_tokens is not None and valid_tokens < 0:
        raise ValueError(f"valid_tokens: {valid_tokens}; allowed: 0 or more, this rank's in all of the step")


def near_ranks(inner: Sequence[Sequence[int]] | None, rank: int, size: int, what_for: str | None) -> list[int] | None:
    """This rank's group of `inner`.

    Args:
        inner: as LoadBalance takes it.
        rank, size: within LoadBalance's group.
        what_for: the setting that needs it; None = none does.
    Returns: None where nothing needs it.
    Raises:
        ValueError: it is needed and not given, or the other way round, or is no partition of the ranks.
    """
    if what_for is None:
        if inner is not None:
            raise ValueError("inner: goes with scope: node or mode: hier, which count within it; set one, or remove it")
        return None
    if inner is None:
        raise ValueError(f"inner: not given, but {what_for} counts within it; give the groups of ranks that are near")
    groups = [list(group) for group in inner]
    if sorted(r for group in groups for r in group) != list(range(size)) or any(g != sorted(g) for g in groups):
        raise ValueError(
            f"inner: {groups}; allowed: groups that have every rank of the group (here 0 to {size - 1}) once, each in "
            f"ascending order, such as {[list(range(size))]}"
        )
    return next(group for group in groups if rank in group)


def check_call(
    num_experts: int,
    top_k: int,
    layer: object,
    logits: Tensor,
    selected: Tensor | None,
    valid_mask: Tensor | None,
) -> None:
    """Of a call in a router: see LoadBalance.

    Raises:
        ValueError: a shape, dtype or name that it does not take.
    """
    where = f"layer {layer}"
    if not isinstance(layer, str | int):
        raise ValueError(f"layer: {layer!r} of type {type(layer).__name__}; allowed: the layer's own name or number")
    if logits.shape[-1:] != (num_experts,) or not logits.is_floating_point():
        raise ValueError(
            f"{where}: logits are {logits.dtype} of shape {tuple(logits.shape)}; allowed: floating, "
            f"(..., num_experts = {num_experts})"
        )
    wanted = (*logits.shape[:-1], top_k)
    if selected is not None and (selected.shape != wanted or selected.is_floating_point()):
        raise ValueError(
            f"{where}: selected is {selected.dtype} of shape {tuple(selected.shape)}; allowed: the integers that "
            f"topk() gives, {wanted}"
        )
    if valid_mask is not None and (valid_mask.shape != logits.shape[:-1] or valid_mask.dtype != torch.bool):
        raise ValueError(
            f"{where}: valid_mask is {valid_mask.dtype} of shape {tuple(valid_mask.shape)}; allowed: bool, "
            f"{tuple(logits.shape[:-1])}, true where a token is not padding"
        )

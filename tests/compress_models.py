"""Small models under DDP for the tests of compression, and their gradients without any."""

from __future__ import annotations

from typing import Any

import torch
from ranks import Rank, seeded
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from thinwire.comm.compress.compressors import LowRank, TopK
from thinwire.comm.compress.feedback import EF
from thinwire.comm.compress.handle import CompressedExchange
from thinwire.comm.method import Method

WIDTH = 24
TOPK = TopK(density=0.1, values="int8")

# Every kind of feedback, with a compressor that suits it.
FEEDBACKS: dict[str, tuple[Any, Any]] = {
    "none": ("natural", "none"),
    "ef": (TOPK, "ef"),
    "ef-int8-storage": (TOPK, EF(storage="int8")),
    "ef-two-shot": ("int4", "ef"),
    "ef21": (TOPK, "ef21"),
    "ef21_w": (TOPK, {"kind": "ef21_w", "smoothness": (1.0, 3.0)}),
    "ef21_sgdm": (TOPK, "ef21_sgdm"),
    "ef21_bc": ("int8", "ef21_bc"),
    "ef21_pp": (TOPK, "ef21_pp"),
    "econtrol": (TOPK, "econtrol"),
    "dgc": (TopK(density=0.1), {"kind": "dgc", "warmup_steps": 6}),
    "lowrank": (LowRank(rank=2), "ef"),
    "global": (TopK(density=0.1, scope="global"), "ef"),
    "stochastic": ({"kind": "int4", "rounding": "stochastic"}, "ef"),
}


def make_model(layers: int = 5, width: int = WIDTH) -> nn.Module:
    with seeded():
        return nn.Sequential(*[nn.Linear(width, width) for _ in range(layers)])


def wrap(rank: Rank, model: nn.Module, **options: Any) -> DistributedDataParallel:
    options = {"init_sync": False, "gradient_as_bucket_view": True, **options}
    return DistributedDataParallel(model, process_group=rank.group, **options)


def inputs_of(rank: int, step: int = 0, width: int = WIDTH) -> Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(100 * step + rank))


def gradients_alone(rank: int, step: int) -> dict[str, Tensor]:
    """Of one rank, at the first weights."""
    model = make_model()
    model(inputs_of(rank, step)).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def tensors_in(state: Any, path: str = "") -> dict[str, Tensor]:
    """All tensors of a method's state, by their place in it."""
    if isinstance(state, Tensor):
        return {path: state.clone()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {name: x for key, value in items for name, x in tensors_in(value, f"{path}/{key}").items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def errors_of(method: Method) -> dict[str, Tensor]:
    """The memory of classic feedback, by parameter name."""
    assert isinstance(method, CompressedExchange)
    errors: dict[str, Tensor] = method.state_dict()["feedback"]["stores"]["error"]
    return errors

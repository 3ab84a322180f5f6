"""What partition() refuses: before anything is sent, with the setting and the way out."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from thinwire.comm.partition.blocks import choose_blocks, find_blocks
from thinwire.comm.partition.door import partition
from thinwire.comm.partition.parameter_groups import name_groups


class Net(nn.Module):
    """Two blocks in a list, a layer before and one after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.last = nn.Linear(6, 2)


def with_attribute(name: str, value: object) -> nn.Module:
    model = Net()
    setattr(model, name, value)
    return model


def frozen() -> nn.Module:
    return Net().requires_grad_(False)


def tied() -> nn.Module:
    model = Net()
    model.last.weight = nn.Parameter(torch.zeros(6, 6))
    model.blocks[0][0].weight = model.last.weight
    return model


def half_on_meta() -> nn.Module:
    model = Net()
    model.last = nn.Linear(6, 2, device="meta")
    return model


def not_contiguous() -> nn.Module:
    return with_attribute("turned", nn.Parameter(torch.zeros(3, 2).t()))


def mesh_of(size: int) -> SimpleNamespace:
    world = SimpleNamespace(name="world", size=size)
    return SimpleNamespace(rank=0, levels=[world], order=range(size), named={"world": world})


class Unrelated(torch.optim.SGD):
    """Trains something else than what it is given."""

    def __init__(self, parameters: Any, **options: Any) -> None:
        super().__init__([nn.Parameter(torch.zeros(2))], **options)


def also_another(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([*parameters, nn.Parameter(torch.zeros(2))], **options)


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "list": (lambda: nn.ModuleList([Net()]), {}, "model: a ModuleList has no forward"),
    "fp64": (
        lambda: Net().double(),
        {},
        "model: parameter first.weight is float64; with weights='fp32'.*float32.*float",
    ),
    "fp16": (lambda: Net().half(), {"weights": "bf16"}, "is float16.*bfloat16 or float32"),
    "bf16": (lambda: Net().bfloat16(), {}, 'is bfloat16.*use weights="bf16"'),
    "mixed": (
        lambda: with_attribute("last", nn.Linear(6, 2).bfloat16()),
        {"weights": "bf16"},
        "one dtype, but first.weight is float32, last.weight is bfloat16",
    ),
    "half on meta": (half_on_meta, {}, "one device, but first.weight is cpu, last.weight is meta"),
    "scalar": (lambda: with_attribute("scale", nn.Parameter(torch.ones(()))), {}, "scale is a scalar.*shape \\(1,\\)"),
    "not contiguous": (not_contiguous, {}, "turned is not contiguous"),
    "sparse": (lambda: with_attribute("words", nn.Embedding(5, 2, sparse=True)), {}, "module words makes sparse"),
    "nothing to train": (frozen, {}, "no parameter has requires_grad"),
    "tied": (tied, {}, "blocks.0.0.weight and last.weight are one parameter, held by blocks.0 and by the model's own"),
    "compute fp16": (Net, {"compute_dtype": torch.float16}, "compute_dtype: torch.float16.*loss scale.*bfloat16"),
    "compute int": (Net, {"compute_dtype": torch.int8}, "compute_dtype: torch.int8; allowed are torch.bfloat16"),
    "prefetch": (Net, {"prefetch": -1}, "prefetch: -1; give an integer of at least 0"),
    "micro_batches": (Net, {"micro_batches": 0}, "micro_batches: 0; give an integer of at least 1"),
    "foreign unit": (Net, {"units": [nn.Linear(2, 2)]}, r"units\[0\]: Linear is not a module of the model"),
    "no such preset": (Net, {"preset": "zero4"}, "zero4.*none of zero1, zero2"),
    "no such level": (Net, {"params": "rack", "grads": "rack"}, "params: the machine has no level 'rack'"),
    "not nested": (
        Net,
        {"params": "world", "grads": "rank", "optim": "world"},
        "grads: rank is a faster level than params",
    ),
    "not nested optim": (
        Net,
        {"params": "rank", "grads": "world", "optim": "rank"},
        "optim: rank is a faster.*give optim",
    ),
    "secondary": (Net, {"preset": "zero3", "secondary": "world"}, "secondary: world is not a faster level"),
    "wire of no level": (
        Net,
        {"preset": "zero3", "gradients": {"rack": "int8"}},
        "gradients.rack: the machine has no such",
    ),
    "no such wire": (Net, {"gradients": {"world": "int3"}}, "gradients.world"),
    "too many ranks": (Net, {"mesh": mesh_of(6)}, "mesh: holds 6 ranks, but the job has 4"),
    "optimizer": (
        Net,
        {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)},
        "optimizer: this SGD holds the whole parameters already; give the class",
    ),
    "no factory": (Net, {"optimizer": "adamw"}, "optimizer: 'adamw' is no optimizer class"),
    "bad option": (Net, {"lr": -1.0}, "Invalid learning rate"),
    "fused SGD": (Net, {"fused": True}, "options: torch has no fused SGD for sharded parameters"),
    "other parameters": (Net, {"optimizer": Unrelated}, "optimizer: it does not train first.weight, .* and 5 others"),
    "more parameters": (Net, {"optimizer": also_another}, "optimizer: it also trains parameters that it was not"),
    "no optimizer": (Net, {"optimizer": lambda p, lr: 3}, "optimizer: it made a int"),
    "group without params": (Net, {"parameter_groups": [{"lr": 1.0}]}, r'parameter_groups\[0\].*has no "params"'),
    "pattern of nothing": (Net, {"parameter_groups": [{"params": "*.scale"}]}, "'\\*.scale' matches no trained"),
    "not all": (Net, {"parameter_groups": [{"params": "*.bias"}]}, "no group holds first.weight.*and 1 others"),
    "twice": (
        Net,
        {"parameter_groups": [{"params": ["last.bias"]}, {"params": ["last.bias", "*"]}]},
        r"parameter_groups\[1\].params: last.bias is in an earlier group",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_before_it_changes_anything(case: str) -> None:
    build, given, message = REFUSED[case]
    model = build()
    before = [(name, id(p)) for name, p in model.named_parameters()]
    levels = {} if "preset" in given else {"params": "world", "grads": "world"}
    settings: dict[str, Any] = {"mesh": mesh_of(4), "optimizer": torch.optim.SGD, **levels, "lr": 0.1, **given}
    queue: Any = SimpleNamespace(
        rank=0, size=4, peers=range(4)
    )  # whoever sent something would find nothing to send it with
    with pytest.raises(ValueError, match="(?s)" + message):
        partition(model, settings.pop("mesh"), settings.pop("optimizer"), queue=queue, **settings)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before


def test_refuses_without_a_process_group() -> None:
    with pytest.raises(ValueError, match=r"torch.distributed is not initialised: call thinwire.init"):
        partition(Net(), mesh_of(4), torch.optim.SGD, lr=0.1)


def test_refuses_a_queue_over_some_ranks() -> None:
    queue: Any = SimpleNamespace(rank=0, size=4, peers=(0, 1, 4, 5))
    with pytest.raises(ValueError, match=r"queue: it joins ranks 0-1, 4-5, and each state.*world.queue"):
        partition(Net(), mesh_of(4), torch.optim.SGD, queue=queue, lr=0.1)


@pytest.mark.parametrize("wrapper", [nn.parallel.DistributedDataParallel, FSDPModule])
def test_refuses_wrapped_modules(wrapper: type) -> None:
    model = Net()
    model.blocks[1].__class__ = type("Wrapped", (wrapper, nn.Sequential), {})
    queue: Any = SimpleNamespace(rank=0, size=4, peers=range(4))
    with pytest.raises(
        ValueError, match=r"model: module blocks.1 is (in DistributedDataParallel|sharded already).*give"
    ):
        partition(model, mesh_of(4), torch.optim.SGD, queue=queue, lr=0.1)


def test_units_must_not_overlap() -> None:
    model = Net()
    assert choose_blocks(model, None) == find_blocks(model) == [model.blocks[0], model.blocks[1]]
    assert choose_blocks(model, [model.last]) == [model.last]
    inside = r"units.1.: blocks.0.0 overlaps units.0., blocks.0: both hold blocks.0.0"
    with pytest.raises(ValueError, match=inside):
        choose_blocks(model, [model.blocks[0], model.blocks[0][0]])
    with pytest.raises(ValueError, match=r"units.1.: blocks.0 overlaps units.0."):
        choose_blocks(model, [model.blocks[0], model.blocks[0]])
    with pytest.raises(ValueError, match=r"units.0.: the model itself is always a unit"):
        choose_blocks(model, [model])
    with pytest.raises(ValueError, match=r"units.0.: blocks has no forward\(\); give its members, units=\[\*blocks\]"):
        choose_blocks(model, [model.blocks])


def test_blocks_are_found_once_and_not_below_each_other() -> None:
    shared = nn.Linear(2, 2)
    experts = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    stages = nn.ModuleList([nn.ModuleList([shared, experts]), nn.Identity()])
    assert find_blocks(nn.Sequential(stages, nn.ModuleDict({"again": shared, "more": nn.ModuleList([shared])}))) == [
        shared,
        experts,
    ]


def test_a_parameter_belongs_to_the_first_group_that_names_it() -> None:
    model = Net()
    groups = name_groups(
        model,
        [
            {"params": model.last.parameters(), "lr": 1.0},
            {"params": ["*.bias", "first.weight"], "lr": 2.0},
            {"params": "*"},
        ],
    )
    assert groups is not None
    assert [(group.names, dict(group.options)) for group in groups] == [
        (("last.weight", "last.bias"), {"lr": 1.0}),
        (("first.bias", "blocks.0.0.bias", "blocks.1.0.bias", "first.weight"), {"lr": 2.0}),
        (("blocks.0.0.weight", "blocks.1.0.weight"), {}),
    ]
    model.first.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameter_groups\[0\].params: first.bias is not trained"):
        name_groups(model, [{"params": ["first.bias"]}])
    with pytest.raises(ValueError, match=r"'last.scale' is no parameter of the model"):
        name_groups(model, [{"params": ["last.scale"]}])
    with pytest.raises(ValueError, match=r"a Parameter is no parameter of the model"):
        name_groups(model, [{"params": nn.Parameter(torch.zeros(2))}])

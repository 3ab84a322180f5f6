"""One step of a model that need not exist: what it computes, when each gradient comes, what is kept for backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import thinwire.dist.models.grouped_product  # noqa: F401  defines the operators that are counted here
from thinwire.comm.partition.blocks import find_blocks
from thinwire.dist.models.gpt import GPT
from thinwire.dist.plan.equal_blocks import Counted, extend, has_equal_blocks


@dataclass(frozen=True)
class BlockTrace:
    """A part of the model that activation checkpointing computes anew.

    forward_flops: of its forward pass. activation_bytes: that it keeps for backward. input_bytes: of its arguments.
    """

    forward_flops: int
    activation_bytes: int
    input_bytes: int


@dataclass(frozen=True)
class StepTrace:
    """A micro-batch's forward and backward pass.

    forward_flops, backward_flops: multiplications and additions of matrix products and attention.
    ready: parameters that learn in the order in which their gradients are complete, each with the share of the backward
        pass's operations that is done by then.
    activation_bytes: kept by forward for backward, each storage once, the weights not counted.
    used: parameters in the order in which forward comes to the modules that have them, each with the share of the
        forward pass's operations that is done by then.
    blocks: see BlockTrace; in the order of the forward pass.
    cast_bytes: of weights in the precision of the computing, kept until backward where autocast makes them; not among
        the activations.
    """

    forward_flops: int
    backward_flops: int
    ready: tuple[tuple[str, float], ...]
    activation_bytes: int
    used: tuple[tuple[str, float], ...] = ()
    blocks: tuple[BlockTrace, ...] = ()
    cast_bytes: int = 0

    def checkpointed(self) -> StepTrace:
        """The same where each block keeps its input alone, and computes the rest anew in the backward pass."""
        spared = sum(block.activation_bytes for block in self.blocks)
        inputs = sum(block.input_bytes for block in self.blocks)
        largest = max((block.activation_bytes for block in self.blocks), default=0)
        return replace(
            self,
            backward_flops=self.backward_flops + sum(block.forward_flops for block in self.blocks),
            activation_bytes=self.activation_bytes - spared + inputs + largest,
        )


def trace_step(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    *,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    network: nn.Module | None = None,
) -> StepTrace:
    """Trace a forward and backward pass on tensors that have a shape and no memory; nothing is computed.

    Args:
        model: inputs -> scores (..., classes); on the meta device, and left as it is.
        inputs, targets: of one micro-batch: tensors or dicts of them, on the meta device.
        context: in which forward runs, such as autocast on the CPU.
        network: the part of the model whose names are used; default: all.
    """
    names = {id(p): name for name, p in (network or model).named_parameters()}
    order = [names[id(p)] for p in model.parameters()]

    def count(blocks: int | None) -> Counted:
        with FakeTensorMode():
            twin = _without_memory(model)
            named = {id(p): name for name, p in zip(order, twin.parameters(), strict=True)}
            if blocks is not None:
                assert isinstance(twin, GPT)
                twin.blocks = twin.blocks[:blocks]
            return _Tracer(twin, named).run(_like(inputs), _like(targets), context)

    if isinstance(model, GPT) and has_equal_blocks(model):
        return step_trace(extend(count(1), count(2), len(model.blocks)))
    return step_trace(count(None))


def step_trace(counted: Counted) -> StepTrace:
    """Shares of what was counted."""
    forward, backward = counted.forward_flops, counted.backward_flops
    return StepTrace(
        forward,
        backward,
        tuple((name, at / backward if backward else 1.0) for name, at in counted.ready),
        counted.activation_bytes,
        tuple((name, at / forward if forward else 0.0) for name, at in counted.used),
        tuple(BlockTrace(*block) for block in counted.blocks),
        counted.cast_bytes,
    )


class _Tracer:
    """Hooks that read an operation counter while a model runs."""

    def __init__(self, model: nn.Module, names: Mapping[int, str]) -> None:
        self._model = model
        self._names = names
        self._counter = FlopCounterMode(display=False, custom_mapping=_FLOPS)
        self._own = {_storage(t) for t in [*model.parameters(), *model.buffers()]}
        self._casts = _Casts(self._own)
        self._kept: dict[int, int] = {}
        self._kept_casts: dict[int, int] = {}
        self._came: list[tuple[str, int]] = []
        self._used: dict[str, int] = {}
        self._open: list[tuple[int, int, int]] = []
        self._blocks: list[tuple[int, int, int]] = []

    def run(self, inputs: Any, targets: Tensor, context: Callable[[], AbstractContextManager[Any]]) -> Counted:
        model, counter = self._model, self._counter
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._note)
        for module in model.modules():
            module.register_forward_pre_hook(self._enter)
        for block in find_blocks(model):
            block.register_forward_pre_hook(self._open_block, with_kwargs=True)
            block.register_forward_hook(self._close_block)
        with counter, self._casts:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor), context():
                scores = model(inputs)
                loss = F.cross_entropy(scores.flatten(0, -2).float(), targets.flatten())
            forward = counter.get_total_flops()
            activation_bytes = sum(self._kept.values())
            if any(parameter.requires_grad for parameter in model.parameters()):
                loss.backward()
            backward = counter.get_total_flops() - forward
        ready = [(name, at - forward) for name, at in self._came]
        casts = sum(self._kept_casts.values())
        return Counted(forward, backward, ready, activation_bytes, list(self._used.items()), self._blocks, casts)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in self._own:
            kept = self._kept_casts if storage in self._casts.made else self._kept
            kept[storage] = tensor.untyped_storage().nbytes()
        return tensor

    def _note(self, parameter: Tensor) -> None:
        self._came.append((self._names[id(parameter)], self._counter.get_total_flops()))

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        for parameter in module.parameters(recurse=False):
            self._used.setdefault(self._names[id(parameter)], self._counter.get_total_flops())

    def _open_block(self, block: nn.Module, arguments: Any, keywords: Any) -> None:
        tensors = [t for t in torch.utils._pytree.tree_leaves((arguments, keywords)) if isinstance(t, Tensor)]
        # What does not depend on the weights, such as rotary angles, is the same for all blocks.
        input_bytes = sum(t.numel() * t.element_size() for t in tensors if t.requires_grad)
        self._open.append((self._counter.get_total_flops(), sum(self._kept.values()), input_bytes))

    def _close_block(self, block: nn.Module, arguments: Any, output: Any) -> None:
        flops, kept, input_bytes = self._open.pop()
        now = sum(self._kept.values())
        self._blocks.append((self._counter.get_total_flops() - flops, now - kept, input_bytes))


class _Casts(TorchDispatchMode):
    """Sees weights cast to another precision. made: by storage; held, so that no other gets its place."""

    def __init__(self, weights: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = weights
        self.made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _storage(args[0]) in self._weights:
            self.made[_storage(out)] = out
        return out


def _without_memory(model: nn.Module) -> nn.Module:
    """A copy on the CPU, whose tensors have no memory."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        twin = torch.empty(tensor.shape, dtype=tensor.dtype)
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = twin
    return copy.deepcopy(model, memo)


def _like(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _like(one) for name, one in value.items()}
    assert isinstance(value, Tensor)
    return torch.zeros(value.shape, dtype=value.dtype)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _product_flops(rows: Sequence[int], matrices: Sequence[int], *_: Any, **__: Any) -> int:
    """rows (count, inner), each times one of the matrices (groups, inner, outer)."""
    return 2 * rows[0] * rows[1] * matrices[2]


def _outer_flops(rows: Sequence[int], others: Sequence[int], *_: Any, **__: Any) -> int:
    """For each group, rows^T (inner, count) @ others (count, outer)."""
    return 2 * rows[0] * rows[1] * others[1]


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products of (length, width) matrices for each head; both halves of the causal square, as torch counts."""
    return 2 * query[0] * query[1] * query[2] * key[2] * (query[3] + value[3])


def _attention_backward_flops(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    """The scores again, and two products for each of the forward pass's."""
    return 2 * query[0] * query[1] * query[2] * key[2] * (3 * query[3] + 2 * value[3])


# What torch does not count by itself.
_FLOPS: dict[Any, Any] = {
    torch.ops.thinwire.grouped_product: _product_flops,
    torch.ops.thinwire.grouped_outer: _outer_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def ddp_buckets(parameters: Sequence[tuple[str, Tensor]], bucket_bytes: int) -> list[list[str]]:
    """The buckets that DDP fills from its second step on, if its bucket_cap_mb was given: the first is as large.

    Args:
        parameters: in the order in which their gradients come.
        bucket_bytes: its bucket_cap_mb, in bytes.
    """
    tensors = [tensor for _, tensor in parameters]
    indices, _ = torch._C._distributed_c10d._compute_bucket_assignment_by_size(
        tensors, [bucket_bytes], [False] * len(tensors)
    )
    return [[parameters[i][0] for i in bucket] for bucket in indices]

"""One machine's model as a flat vector: all that the algorithms know of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class Replica(Protocol):
    """A machine's weights and, between backward and step, its gradient.

    Attributes: numel; sizes, elements of each learned tensor, in order; what comes after them are statistics; dtype,
    fp32 (fp64 in tests and simulations of mathematics); device.
    """

    numel: int
    sizes: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    def weights(self) -> Tensor:
        """A copy."""
        ...

    def set_weights(self, value: Tensor) -> None: ...

    def gradient(self) -> Tensor:
        """A copy; zeros where a parameter has none."""
        ...

    def set_gradient(self, value: Tensor) -> None: ...

    @property
    def lr(self) -> float:
        """The optimizer's learning rate of the step at hand."""
        ...


class VectorReplica:
    """A replica that is nothing but its vector.

    Args:
        sizes: of the tensors that it is made of; default: one.
    Attributes: x, the weights; g, the gradient; lr.
    """

    def __init__(self, x: Tensor, lr: float = 1.0, sizes: Sequence[int] | None = None) -> None:
        self.x = x.clone()
        self.g = torch.zeros_like(x)
        self.lr = lr
        self.numel = x.numel()
        self.sizes = sizes or [x.numel()]
        self.dtype = x.dtype
        self.device = x.device

    def weights(self) -> Tensor:
        return self.x.clone()

    def set_weights(self, value: Tensor) -> None:
        self.x = value.clone()

    def gradient(self) -> Tensor:
        return self.g.clone()

    def set_gradient(self, value: Tensor) -> None:
        self.g = value.clone()


class ShapeReplica:
    """A replica that need not exist: an algorithm that is made for it says what it would send, and nothing else.

    Args:
        sizes: of the tensors that learn. statistics: elements of those that do not.
    """

    dtype = torch.float32
    device = torch.device("meta")
    lr = 1.0

    def __init__(self, sizes: Sequence[int], statistics: int = 0) -> None:
        self.sizes = sizes
        self.numel = sum(sizes) + statistics

    def weights(self) -> Tensor:
        """None of them."""
        return torch.empty(0)

    def set_weights(self, value: Tensor) -> None:
        """Nothing to set."""

    def gradient(self) -> Tensor:
        """None."""
        return torch.empty(0)

    def set_gradient(self, value: Tensor) -> None:
        """Nothing to set."""


class ModelReplica:
    """The trainable parameters of a model, one after another, in fp32.

    Parameters of 16 bits keep an fp32 master here: averages of nearly equal weights would be lost in their rounding.
    Of a sharded parameter it is this rank's shard.

    Args:
        parameters: in an order that is the same on all machines.
        optimizer: whose learning rate is asked for; None: nobody asks.
        statistics: buffers that are averaged with them, such as those of batch normalisation.
    Attributes: spoilt, whether another shard of this machine is not finite: then weights() are not either.
    """

    dtype = torch.float32

    def __init__(
        self, parameters: Sequence[Tensor], optimizer: Optimizer | None = None, statistics: Sequence[Tensor] = ()
    ) -> None:
        self._parameters = list(parameters)
        self._tensors = [*self._parameters, *statistics]
        self._optimizer = optimizer
        self.spoilt = False
        self.device = local(self._tensors[0]).device
        self._sizes = [local(t).numel() for t in self._tensors]
        self.sizes: Sequence[int] = self._sizes[: len(self._parameters)]
        self._learned = sum(self.sizes)
        self.numel = sum(self._sizes)
        narrow = any(local(t).dtype != torch.float32 for t in self._tensors)
        self._master = self._read() if narrow else None
        self._rounded = self._read() if narrow else None  # the parameters when the master was last brought up to date

    @property
    def lr(self) -> float:
        assert self._optimizer is not None
        return float(self._optimizer.param_groups[0]["lr"])

    @torch.no_grad()
    def weights(self) -> Tensor:
        """A copy. Of 16-bit parameters the master, moved by what the optimizer has moved the parameters."""
        if self.spoilt:
            return torch.full((self.numel,), torch.nan, device=self.device)
        present = self._read()
        if self._master is None or self._rounded is None:
            return present
        self._master += present - self._rounded
        self._rounded = present
        return self._master.clone()

    @torch.no_grad()
    def set_weights(self, value: Tensor) -> None:
        """Write them into the model, each in its dtype."""
        for tensor, part in zip(self._tensors, value.split(self._sizes), strict=True):
            local(tensor).copy_(part.view(local(tensor).shape))
        if self._master is not None:
            self._master = value.clone()
            self._rounded = self._read()

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """A copy; zeros where a parameter has none, and for statistics."""
        flat = torch.zeros(self.numel, device=self.device)
        for tensor, part in zip(self._parameters, self._learned_parts(flat), strict=True):
            if tensor.grad is not None:
                part.copy_(local(tensor.grad).reshape(-1))
        return flat

    @torch.no_grad()
    def set_gradient(self, value: Tensor) -> None:
        """Write it into the parameters' .grad, also where there was none."""
        for tensor, part in zip(self._parameters, self._learned_parts(value), strict=True):
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
            local(tensor.grad).copy_(part.view(local(tensor).shape))

    @contextlib.contextmanager
    def holding(self, value: Tensor) -> Iterator[None]:
        """Within this context the model has other weights; afterwards its own again, bit for bit."""
        own = [local(tensor).clone() for tensor in self._tensors]
        narrow = self._master, self._rounded
        self.set_weights(value)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, kept in zip(self._tensors, own, strict=True):
                    local(tensor).copy_(kept)
            self._master, self._rounded = narrow

    def state_dict(self) -> dict[str, Tensor]:
        """What the model's own state does not have: the master of 16-bit parameters."""
        return {} if self._master is None else {"master": self.weights()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what state_dict() gave, after the model has its own weights again."""
        if self._master is not None:
            self._master = state["master"].to(self.device, copy=True)
            self._rounded = self._read()

    def _learned_parts(self, flat: Tensor) -> Sequence[Tensor]:
        return torch.split(flat[: self._learned], list(self.sizes))

    def _read(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([local(t).reshape(-1).to(torch.float32) for t in self._tensors])


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()

"""Named tensors that change only at commit(): as sums of decoded messages, or written anew beside the old value."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from thinwire.comm.compress.decoded import Decoded, add_to

Storage = Literal["fp32", "int8"]


class Store(ABC):
    """One tensor for each parameter name, zero where nothing has been committed.

    Attributes: storage, the format, as settings and checkpoints name it.
    """

    storage: ClassVar[Storage] = "fp32"

    @abstractmethod
    def __contains__(self, name: str) -> bool:
        """Whether anything has been committed under this name."""

    @abstractmethod
    def now(self, name: str, like: Tensor) -> Tensor:
        """The committed value, in the shape of `like`. Not to be written to."""

    @abstractmethod
    def commit(self) -> None: ...

    @abstractmethod
    def rollback(self) -> None: ...

    @abstractmethod
    def add(self, name: str, offset: int, values: Tensor) -> None:
        """Add to the committed value, at once, at flat positions offset, ...; the name must be there."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """A copy of all that is committed."""

    @abstractmethod
    def load(self, state: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def average(self, states: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
        """The state whose values are sum_r weights[r] * states[r]; a name that a state lacks counts as zero there."""

    @abstractmethod
    def kept_bytes(self, numel: int) -> int:
        """What it holds between steps of a tensor with so many elements, from the second step on."""

    @abstractmethod
    def norm(self) -> float:
        """Euclidean norm over all names."""


class Buffered(Store):
    """A store whose next value is written as a whole: next(), fill it, seal(), and commit() makes it the value."""

    @abstractmethod
    def next(self, name: str, like: Tensor) -> Tensor:
        """Where to write the next value; its content is undefined."""

    @abstractmethod
    def seal(self, name: str) -> None:
        """The tensor of next() is complete."""


class Exact(Store):
    """What stores have in common that hold the values themselves."""

    def __init__(self) -> None:
        self._now: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._now

    def now(self, name: str, like: Tensor) -> Tensor:
        value = self._now.get(name)
        if value is None:
            return torch.zeros_like(like)  # in the first step only
        check_shape(name, value.shape, like)
        return value

    def add(self, name: str, offset: int, values: Tensor) -> None:
        check_range(name, offset, values, self._now[name].numel())
        self._now[name].view(-1)[offset : offset + values.numel()] += values.view(-1)

    def scale(self, factor: float) -> None:
        """Multiply every committed value, at once."""
        for value in self._now.values():
            value.mul_(factor)

    def state(self) -> dict[str, Any]:
        return {name: value.clone() for name, value in self._now.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        self.rollback()
        self._now = {name: value.clone() for name, value in state.items()}

    def average(self, states: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> dict[str, Any]:
        return weighted_sums(states, weights)

    def norm(self) -> float:
        return norm(self._now.values())


class Sum(Exact):
    """A sum of decoded messages, added at commit(): 1 value per element, and a message until then (small if sparse)."""

    def __init__(self) -> None:
        super().__init__()
        self._staged: dict[str, tuple[Decoded, torch.Size]] = {}

    def kept_bytes(self, numel: int) -> int:
        return 4 * numel

    def stage(self, name: str, decoded: Decoded, like: Tensor) -> None:
        self._staged[name] = decoded, like.shape

    def commit(self) -> None:
        for name, (decoded, shape) in self._staged.items():
            if name not in self._now:
                values = decoded if isinstance(decoded, Tensor) else decoded.values
                self._now[name] = torch.zeros(shape, dtype=values.dtype, device=values.device)
            add_to(self._now[name], decoded)
        self._staged.clear()

    def rollback(self) -> None:
        self._staged.clear()


class Pair(Exact, Buffered):
    """Two buffers that change places at commit(): 2 values per element, and no pass over them for being undoable."""

    def __init__(self) -> None:
        super().__init__()
        self._spare: dict[str, Tensor] = {}
        self._sealed: set[str] = set()

    def kept_bytes(self, numel: int) -> int:
        return 2 * 4 * numel

    def next(self, name: str, like: Tensor) -> Tensor:
        if name not in self._spare:
            self._spare[name] = torch.empty_like(like)
        return self._spare[name]

    def seal(self, name: str) -> None:
        self._sealed.add(name)

    def commit(self) -> None:
        for name in self._sealed:
            complete = self._spare.pop(name)
            if name in self._now:
                self._spare[name] = self._now[name]
            self._now[name] = complete
        self._sealed.clear()

    def rollback(self) -> None:
        self._sealed.clear()


def weighted_sums(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """By name, sum_r weights[r] * states[r][name], added in rank order."""
    sums: dict[str, Tensor] = {}
    for state, weight in zip(states, weights, strict=True):
        for name, value in state.items():
            if name in sums:
                sums[name].add_(value, alpha=weight)
            else:
                sums[name] = value * weight
    return sums


def norm(values: Iterable[Tensor]) -> float:
    """Euclidean norm over all of them."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(value)) ** 2 for value in values))


def check_shape(name: str, shape: Sequence[int], like: Tensor) -> None:
    if tuple(shape) != tuple(like.shape):
        raise ValueError(
            f"feedback: the memory of {name} has shape {tuple(shape)}, but its gradient {tuple(like.shape)}; "
            "it was loaded for another model, or two parameters share the name"
        )


def check_range(name: str, offset: int, values: Tensor, numel: int) -> None:
    if not 0 <= offset <= offset + values.numel() <= numel:
        raise ValueError(
            f"feedback: cannot give back {values.numel()} values from position {offset} of {name}, "
            f"which has {numel} elements"
        )

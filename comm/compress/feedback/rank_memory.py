"""What all kinds of feedback share: stores that commit together, the loss scale, checkpoints, a new world size."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from thinwire.comm.compress.decoded import Decoded
from thinwire.comm.compress.draw import Draw
from thinwire.comm.compress.feedback.blocks import BlockPair
from thinwire.comm.compress.feedback.protocol import Place
from thinwire.comm.compress.feedback.store import Buffered, Pair, Storage, Store


class RankMemory(ABC):
    """Base of the kinds: all of a Feedback but after(), and what is encoded, which either memories() or before() gives.

    Attributes:
        kind: as in the settings.
        same_on_all_ranks: labels of the stores in which every rank holds the same bits.
        gives_back_to: label of the store that a given back error enters, and its sign there; None: nowhere.
    """

    kind: ClassVar[str]
    server_error: ClassVar[bool] = False
    sums_means: ClassVar[bool] = False
    same_on_all_ranks: ClassVar[frozenset[str]] = frozenset()
    gives_back_to: ClassVar[tuple[str, float] | None] = None

    def __init__(self, place: Place, **stores: Store) -> None:
        self._place = place
        self._stores = stores
        self._step = 0
        self._scale = 1.0

    def begin_step(self, step: int, scale: float = 1.0) -> None:
        self.rollback()
        self._step, self._scale = step, scale

    def memories(self, name: str, gradient: Tensor) -> tuple[Tensor, Tensor] | None:
        return None

    def before(self, name: str, gradient: Tensor) -> Tensor:
        raise AssertionError(f"{self.kind} has memories: its gradients are encoded with them")

    @abstractmethod
    def after(self, name: str, sent: Decoded | None, mean: Tensor) -> None: ...

    def weights(self, size: int) -> Sequence[float] | None:
        return None

    def density(self, final: float) -> float:
        return final

    def commit(self) -> None:
        for store in self._stores.values():
            store.commit()

    def rollback(self) -> None:
        for store in self._stores.values():
            store.rollback()

    def give_back(self, name: str, offset: int, error: Tensor) -> None:
        if self.gives_back_to is None:
            raise ValueError(f"feedback: kind {self.kind} keeps no memory that could take back an error; choose ef")
        label, sign = self.gives_back_to
        if name not in self._stores[label]:
            raise ValueError(f"feedback: {name} has no memory yet, so none to give an error back to")
        self._stores[label].add(name, offset, error * sign)

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "stores": {label: store.state() for label, store in self._stores.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._check(state, self._place.rank, self._place.size)
        for label, store in self._stores.items():
            store.load(state["stores"][label])

    def merge(self, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        for rank, state in enumerate(states):
            self._check(state, rank, len(states))
        means = self._mean_weights(states)
        first = [1.0] + [0.0] * (len(states) - 1)
        return {
            **self._identity(),
            "stores": {
                label: store.average(
                    [state["stores"][label] for state in states], first if label in self.same_on_all_ranks else means
                )
                for label, store in self._stores.items()
            },
        }

    def kept_bytes(self, numel: int) -> int:
        return sum(store.kept_bytes(numel) for store in self._stores.values())

    def metrics(self) -> dict[str, float]:
        return {f"{label}_norm": store.norm() for label, store in self._stores.items()}

    def _mean_weights(self, states: Sequence[Mapping[str, Any]]) -> Sequence[float]:
        """How much of each old rank's own stores every new rank gets."""
        return [1 / len(states)] * len(states)

    def _identity(self) -> dict[str, Any]:
        """What must agree between a state and the feedback that loads it."""
        storage = {label: store.storage for label, store in self._stores.items()}
        return {"kind": self.kind, "storage": storage, "rank": self._place.rank, "size": self._place.size}

    def _check(self, state: Mapping[str, Any], rank: int, size: int) -> None:
        expected = {**self._identity(), "rank": rank, "size": size}
        for key, needed in expected.items():
            if state.get(key) != needed:
                raise ValueError(
                    f"feedback: the state has {key} {state.get(key)!r}, but {needed!r} is needed; resume with "
                    "the settings that it was saved with, and bring a state of other ranks here with merge()"
                )

    def _factor(self, name: str) -> float:
        """What brings a gradient, as it comes, to the units of the memory: at least the loss scale is taken out."""
        return 1.0 / self._scale

    def _take_in(self, name: str, gradient: Tensor) -> Tensor:
        """The gradient in the units of the memory, in place."""
        factor = self._factor(name)
        return gradient if factor == 1.0 else gradient.mul_(factor)

    def _buffered(self, storage: Storage, label: str) -> Buffered:
        """A store of the wanted format whose rounding depends on the step, the name and the rank."""
        return Pair() if storage == "fp32" else BlockPair(lambda name: self._key(f"{label}/{name}"))

    def _key(self, name: str) -> int:
        return Draw(self._place.seed, self._step, name, self._place.rank).own_key()

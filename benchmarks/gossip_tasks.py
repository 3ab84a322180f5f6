"""What the machines of gossip's benchmarks learn: small tasks whose data differ from machine to machine.

All machines live in one process. Those of the MLP tasks take their local steps at once, as one batched product; what
they exchange is up to their agents, which see one row each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from thinwire.comm.gossip.replica import Replica
from thinwire.dist.data import Data, DataSettings
from thinwire.dist.models.gpt import GPT, GPTSettings

DIRICHLET = 0.1


class Task(Protocol):
    """Machines with data of their own.

    Attributes: name; measure, what score() gives; better, 1 where more of it is better and -1 where less is; every,
    local steps of a round; rounds, of a run; replicas, by machine.
    """

    name: str
    measure: str
    better: int
    every: int
    rounds: int
    replicas: Sequence[Replica]

    def step(self) -> None:
        """One local step of every machine."""
        ...

    def score(self, weights: Tensor) -> list[float]:
        """Of models on data that is the same for all: (models, numel) to one number each."""
        ...


class Row:
    """Replica: one row of all machines' weights."""

    dtype = torch.float32
    device = torch.device("cpu")
    lr = 1.0

    def __init__(self, weights: Tensor, rank: int, sizes: Sequence[int]) -> None:
        self._row = weights[rank]
        self.numel = self._row.numel()
        self.sizes = list(sizes)

    def weights(self) -> Tensor:
        return self._row.clone()

    def set_weights(self, value: Tensor) -> None:
        self._row.copy_(value)

    def gradient(self) -> Tensor:
        raise NotImplementedError("these machines take their steps together")

    def set_gradient(self, value: Tensor) -> None:
        raise NotImplementedError("these machines take their steps together")


class Perceptrons:
    """A two-layer MLP on each machine, trained by SGD: relu(x W1 + b1) W2 + b2.

    W1 ~ N(0, 2 / inputs), W2 ~ N(0, 1 / hidden), biases 0, the same on all machines. The classes that a machine sees
    are mixed by a draw of its own from Dirichlet(0.1).
    """

    measure = "accuracy"
    better = 1
    every = 20
    rounds = 150
    batch = 16
    hidden = 64
    classes = 10

    def __init__(self, name: str, size: int, seed: int, inputs: int, lr: float) -> None:
        self.name = name
        self._lr = lr
        self._generator = torch.Generator().manual_seed(1000 * seed + 7)
        mixes = np.random.default_rng(seed).dirichlet([DIRICHLET] * self.classes, size)
        self._mixes = torch.tensor(mixes, dtype=torch.float32)
        hidden, classes = self.hidden, self.classes
        self._shapes = [(inputs, hidden), (1, hidden), (hidden, classes), (1, classes)]
        self._sizes = [math.prod(shape) for shape in self._shapes]
        start = torch.Generator().manual_seed(1000 * seed + 8)
        first = torch.randn(self._sizes[0], generator=start) * math.sqrt(2 / inputs)
        second = torch.randn(self._sizes[2], generator=start) * math.sqrt(1 / hidden)
        same = torch.cat([first, torch.zeros(hidden), second, torch.zeros(classes)])
        self._weights = same.repeat(size, 1)
        self.replicas = [Row(self._weights, rank, self._sizes) for rank in range(size)]

    def step(self) -> None:
        """As Task says."""
        y = torch.multinomial(self._mixes, self.batch, replacement=True, generator=self._generator)
        x = self.draw(y)
        w1, b1, w2, b2 = self._parts(self._weights)
        before = torch.baddbmm(b1, x, w1)
        h = before.relu()
        wrong = torch.baddbmm(b2, h, w2).softmax(-1)
        wrong.scatter_add_(2, y[..., None], torch.full((*y.shape, 1), -1.0)).div_(self.batch)
        back = torch.bmm(wrong, w2.transpose(1, 2)) * (before > 0)
        w2.baddbmm_(h.transpose(1, 2), wrong, alpha=-self._lr)
        b2.sub_(wrong.sum(1, keepdim=True), alpha=self._lr)
        w1.baddbmm_(x.transpose(1, 2), back, alpha=-self._lr)
        b1.sub_(back.sum(1, keepdim=True), alpha=self._lr)

    def score(self, weights: Tensor) -> list[float]:
        """As Task says."""
        x, y = self.test()
        w1, b1, w2, b2 = self._parts(weights)
        scores = torch.baddbmm(b2, torch.baddbmm(b1, x.expand(len(weights), -1, -1), w1).relu(), w2)
        right: list[float] = (scores.argmax(-1) == y).float().mean(1).tolist()
        return right

    def draw(self, y: Tensor) -> Tensor:
        """Inputs of these classes, at random: (..., inputs)."""
        raise NotImplementedError

    def test(self) -> tuple[Tensor, Tensor]:
        """The inputs and classes of the test."""
        raise NotImplementedError

    def _parts(self, weights: Tensor) -> list[Tensor]:
        parts = weights.split(self._sizes, dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, self._shapes, strict=True)]


class Mixture(Perceptrons):
    """Ten classes of two modes each, centres N(0, 0.62^2) in 32 dimensions, unit noise; every batch is fresh."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__("mixture", size, seed, inputs=32, lr=0.05)
        self._centres = torch.randn(self.classes, 2, 32, generator=self._generator) * 0.62
        y = torch.arange(self.classes).repeat_interleave(200)
        self._test = self.draw(y), y

    def draw(self, y: Tensor) -> Tensor:
        """As Perceptrons says."""
        mode = torch.randint(0, 2, y.shape, generator=self._generator)
        return self._centres[y, mode] + torch.randn(*y.shape, 32, generator=self._generator)

    def test(self) -> tuple[Tensor, Tensor]:
        """As Perceptrons says."""
        return self._test


class Digits(Perceptrons):
    """scikit-learn's 1797 handwritten digits of 8 x 8 pixels, a fifth of them for the test."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__("digits", size, seed, inputs=64, lr=0.05)
        images, labels = _digits()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        held, rest = order[: len(order) // 5], order[len(order) // 5 :]
        self._test = images[held], labels[held]
        by_class = [images[rest[labels[rest] == label]] for label in range(self.classes)]
        self._counts = torch.tensor([len(found) for found in by_class])
        self._first = self._counts.cumsum(0) - self._counts
        self._images = torch.cat(by_class)

    def draw(self, y: Tensor) -> Tensor:
        """As Perceptrons says."""
        which = (torch.rand(y.shape, generator=self._generator) * self._counts[y]).long()
        return self._images[self._first[y] + which]

    def test(self) -> tuple[Tensor, Tensor]:
        """As Perceptrons says."""
        return self._test


class Text:
    """A small GPT on each machine, AdamW; each has its own part of the standard library's files, in order of names."""

    name = "text"
    measure = "bits per byte"
    better = -1
    every = 1
    rounds = 192
    context = 32
    batch = 4

    def __init__(self, size: int, seed: int) -> None:
        data = _text(self.context)
        self._training = data.training
        shape = GPTSettings(layers=2, heads=2, width=32, context=self.context)
        self._model = GPT(shape, data.tokenizer.vocab)
        self._model.initialise(seed)
        self._shapes = {name: p.shape for name, p in self._model.named_parameters()}
        self._sizes = [p.numel() for p in self._model.parameters()]
        self._weights = torch.cat([p.detach().reshape(-1) for p in self._model.parameters()]).repeat(size, 1)
        self.replicas = [Row(self._weights, rank, self._sizes) for rank in range(size)]
        # It works on each element by itself, so one for all machines is one for each.
        self._optimizer = torch.optim.AdamW([self._weights], lr=4e-3, weight_decay=0.0)
        self._slope = torch.func.vmap(torch.func.grad(self._loss))
        share = data.training.count // size
        self._firsts = [rank * share for rank in range(size)]
        self._share = share
        self._chance = np.random.default_rng(seed)
        held = data.validation.count
        self._test = data.validation.batch(range(0, held, max(1, held // 96)), _CPU)

    def step(self) -> None:
        """As Task says."""
        windows = [first + self._chance.integers(0, self._share, self.batch) for first in self._firsts]
        batch = self._training.batch(np.concatenate(windows).tolist(), _CPU)
        machines = (len(windows), self.batch, self.context)
        with sdpa_kernel(SDPBackend.MATH):  # the only one that takes all machines at once
            self._weights.grad = self._slope(self._weights, batch.inputs.view(machines), batch.targets.view(machines))
        self._optimizer.step()

    @torch.no_grad()
    def score(self, weights: Tensor) -> list[float]:
        """As Task says."""
        return [float(self._loss(row, self._test.inputs, self._test.targets)) / math.log(2) for row in weights]

    def _loss(self, weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        parts = zip(self._shapes.items(), weights.split(self._sizes), strict=True)
        given = {name: part.view(shape) for (name, shape), part in parts}
        scores = torch.func.functional_call(self._model, given, (inputs,))
        return F.cross_entropy(scores.flatten(0, 1), targets.flatten())


_CPU = torch.device("cpu")


@functools.cache
def _text(context: int) -> Data:
    return Data(DataSettings(), context=context, seed=0)


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as missing:
        raise SystemExit("the digits are scikit-learn's: python -m pip install scikit-learn") from missing
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16.0, torch.tensor(labels)

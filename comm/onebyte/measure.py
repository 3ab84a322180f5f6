"""What a machine does in its turn: evaluate the loss at perturbed weights, and take the slopes."""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

from thinwire.comm.onebyte.exchange import Turn
from thinwire.comm.onebyte.replica import Replica
from thinwire.comm.onebyte.rounds import SHARED_SLOT
from thinwire.comm.onebyte.settings import OneByteSettings
from thinwire.comm.onebyte.stream import place

Closure: TypeAlias = Callable[[], Tensor | float]


def measure(
    closure: Closure, turn: Turn, replica: Replica, settings: OneByteSettings
) -> tuple[list[float], list[float]]:
    """The losses that the closure gave, and the slope along each direction of the turn, from them.

    Random numbers that the closure draws from torch are the same each time, so that two losses differ by their weights
    alone. The weights are left perturbed: the round that follows takes that back in its own pass.
    """
    eps = math.ldexp(1.0, replica.manifest.numerics.eps_log2)
    slot = SHARED_SLOT if settings.directions == "shared" else turn.slot
    two_sided = settings.estimate == "two_sided"
    random = _random_state()
    losses: list[float] = []
    slopes: list[float] = []

    def evaluate() -> float:
        _set_random_state(random)
        losses.append(_checked(closure()))
        return losses[-1]

    replica.restore()
    middle = 0.0 if two_sided or not turn.samples else evaluate()
    for sample in range(turn.samples):
        direction = place(turn.round, slot, sample)
        replica.perturb(direction, 1)
        ahead = evaluate()
        if two_sided:
            replica.perturb(direction, -1)
            slopes.append((ahead - evaluate()) / (2 * eps))
        else:
            slopes.append((ahead - middle) / eps)
    return losses, slopes


@contextlib.contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """Evaluation mode; after it, each module's own mode again."""
    modules = list(model.modules()) if model is not None else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _checked(loss: Tensor | float) -> float:
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"OneByteSPSA: the closure gave a loss of shape {tuple(loss.shape)}; give its mean, a scalar"
            )
        if loss.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"OneByteSPSA: the closure gave a {loss.dtype} loss, too coarse for its difference over 2 eps to mean "
                "anything; compute it in fp32: F.cross_entropy(logits.float(), targets)"
            )
    elif not isinstance(loss, numbers.Real):
        raise ValueError(
            f"OneByteSPSA: the closure gave {type(loss).__name__}, no loss; it must return the mean loss of its batch"
        )
    return float(loss.detach()) if isinstance(loss, Tensor) else float(loss)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])

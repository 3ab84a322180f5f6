"""Running statistics of batch normalisation after a merge: those of no machine fit the mean of all weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def recalibrate(model: nn.Module, calibrate: Callable[[], object]) -> int:
    """Measure the running statistics of batch normalisation anew: theirs are of models that are no more.

    As in Izmailov et al. 2018 (1803.05407) and 2507.06542: statistics are reset and become the plain mean over the
    calibration batches. Only normalisation is in training mode meanwhile, so dropout is off and no gradient is kept.

    Args:
        calibrate: runs the model on some batches of training data; 32 are plenty. It must leave the modes of the
            model's modules alone.
    Returns: batch normalisations that were measured; 0: the model has none with running statistics, and `calibrate` is
        not called.
    Raises:
        ValueError: it has not run the whole model, or not in training mode. All statistics are then as before.
    """
    layers = normalisations(model)
    if not layers:
        return 0
    before = [_Kept.of(layer) for layer in layers.values()]
    with _only_normalisations_train(model, list(layers.values())), torch.no_grad():
        for layer in layers.values():
            layer.reset_running_stats()
            layer.momentum = None  # torch's way to say: the mean over all batches since the reset
        try:
            calibrate()
            measured = {name: int(layer.num_batches_tracked or 0) for name, layer in layers.items()}
        except BaseException:
            _put_back(before)
            raise
        if missing := [name for name, count in measured.items() if count == 0]:
            _put_back(before)
            raise ValueError(
                f"calibrate: it has run no batch through {', '.join(missing[:3])}"
                f"{' and others' if missing[3:] else ''}; let it call the model on a few training batches, without "
                "model.eval(), or set method.statistics to local or mix"
            )
        for layer, kept in zip(layers.values(), before, strict=True):
            layer.momentum = kept.momentum
    return len(layers)


def normalisations(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch normalisations of a model that keep running statistics, by name."""
    return {
        name or "the model": module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and module.running_mean is not None
    }


@dataclass(frozen=True)
class _Kept:
    """What a layer had before it was measured anew."""

    layer: _BatchNorm
    momentum: float | None
    buffers: dict[str, Tensor]

    @classmethod
    def of(cls, layer: _BatchNorm) -> _Kept:
        return cls(layer, layer.momentum, {name: b.clone() for name, b in layer.named_buffers(recurse=False)})


def _put_back(before: list[_Kept]) -> None:
    for kept in before:
        kept.layer.momentum = kept.momentum
        for name, buffer in kept.layer.named_buffers(recurse=False):
            buffer.copy_(kept.buffers[name])


@contextlib.contextmanager
def _only_normalisations_train(model: nn.Module, layers: list[_BatchNorm]) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training

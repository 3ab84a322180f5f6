"""What training by forward passes can fail with, beside the network."""

from __future__ import annotations


class WeightRangeError(ArithmeticError):
    """A step would move weights beyond what their grid can hold: training has diverged, or the grid is too fine.

    The weights are those before the round, and the round is not in the log.
    """


class TornWeightsError(RuntimeError):
    """An exception, such as Ctrl-C, has left some tensors changed and others not."""


class ModelMismatchError(RuntimeError):
    """The weights of machines that should be equal bit for bit are not, or are not those of base and log."""

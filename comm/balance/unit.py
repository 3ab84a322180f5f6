"""One micro-batch on one rank: the smallest batch that a load could be balanced over."""

from __future__ import annotations

import torch
from torch import Tensor


class Unit:
    """What the layers counted in one micro-batch.

    Counts are assigned to a layer's row and never added to it, so whatever is computed twice counts once.

    Attributes: number, of this micro-batch since the start; place, within its step, from 0; announced, the valid tokens
    that this rank expects in the whole step, in the first unit if the trainer said so; 0 = it did not; is_filled,
    whether every layer has counted.
    """

    def __init__(self, number: int, place: int, announced: int) -> None:
        self.number = number
        self.place = place
        self.announced = announced
        self.is_filled = False
        self._by_layer: dict[int, Tensor] = {}
        self._rows: Tensor | None = None

    def __contains__(self, layer: int) -> bool:
        return layer in self._by_layer

    def __len__(self) -> int:
        return len(self._by_layer)

    def put(self, layer: int, row: Tensor) -> None:
        """What a layer has counted: (columns.width,) int32."""
        self._by_layer[layer] = row

    def row(self, layer: int) -> Tensor:
        """What put() took."""
        return self._by_layer[layer]

    @property
    def rows(self) -> Tensor:
        """(layers, columns.width) int32, once every layer has counted."""
        if self._rows is None:
            self._rows = torch.stack([self._by_layer[layer] for layer in range(len(self._by_layer))])
        return self._rows

"""What the owners of slices could not send of a mean: kept by parameter name and range, so that slices may move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thinwire.comm.compress.collectives.flat import joined

_Pieces = list[tuple[int, Tensor]]  # (offset within the parameter, flat fp32 tensor)


class OwnerErrors:
    """Errors E of the slices that this rank owns. Transactional: next() stages, commit() keeps, rollback() forgets.

    Slices move when DDP lays its buckets out anew and when the number of ranks changes. What this rank holds of a range
    that it no longer owns is then surrendered: as a rank's own error of n*E, it adds the same to the next mean.
    """

    def __init__(self) -> None:
        self._kept: dict[str, _Pieces] = {}
        self._staged: dict[str, _Pieces] = {}
        self._lost: list[tuple[str, int, Tensor]] = []
        self._staged_lost: list[tuple[str, int, Tensor]] = []

    def next(
        self, names: Sequence[str], numels: Sequence[int], start: int, like: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        """E of the slice of `like`'s length that begins at `start` of the joined tensors, and where to write the next.

        Args:
            names, numels: of the joined tensors.
            size: ranks that share them.
        """
        next_error = torch.empty_like(like)
        stop = start + like.numel()
        errors = []
        first = 0  # of the parameter, in the joined tensor
        for name, numel in zip(names, numels, strict=True):
            begin, end = max(start - first, 0), min(stop - first, numel)  # what this rank owns of the parameter
            owned = max(end - begin, 0)
            kept = [(offset, piece.to(like.device)) for offset, piece in self._kept.get(name, [])]
            found, lost = _cut(kept, begin, begin + owned, like)
            self._staged_lost += [(name, offset, piece * size) for offset, piece in lost]
            at = first + begin - start
            self._staged[name] = [(begin, next_error[at : at + owned])] if owned else []
            errors.append(found)
            first += numel
        return joined([error for error in errors if error.numel()] or [torch.empty_like(like)]), next_error

    def commit(self) -> None:
        self._kept |= self._staged
        self._lost += self._staged_lost
        self.rollback()

    def rollback(self) -> None:
        self._staged, self._staged_lost = {}, []

    def surrendered(self) -> list[tuple[str, int, Tensor]]:
        """(name, offset, n*E) of the ranges that this rank has lost, each told once."""
        lost, self._lost = self._lost, []
        return lost

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """{name: {offset: E}}."""
        return {name: {str(offset): piece for offset, piece in pieces} for name, pieces in self._kept.items() if pieces}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        self.rollback()
        self._lost = []
        self._kept = {
            name: [(int(offset), piece.clone()) for offset, piece in pieces.items()] for name, pieces in state.items()
        }

    @staticmethod
    def union(states: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
        """One state with the pieces of several ranks, which do not overlap."""
        merged: dict[str, dict[str, Any]] = {}
        for state in states:
            for name, pieces in state.items():
                merged.setdefault(name, {}).update(pieces)
        return merged


def _cut(pieces: _Pieces, begin: int, end: int, like: Tensor) -> tuple[Tensor, _Pieces]:
    """The error in [begin, end), zero where nothing is kept, and the pieces outside."""
    if len(pieces) == 1 and pieces[0][0] == begin and pieces[0][1].numel() == end - begin:
        return pieces[0][1], []
    inside, outside = like.new_zeros(end - begin), []
    for offset, piece in pieces:
        first, last = max(begin - offset, 0), min(end - offset, piece.numel())
        if first >= last:
            outside.append((offset, piece))
            continue
        inside[offset + first - begin : offset + last - begin] = piece[first:last]
        outside += [(at, part) for at, part in ((offset, piece[:first]), (offset + last, piece[last:])) if part.numel()]
    return inside, outside

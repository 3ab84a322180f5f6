"""One call of a collective: what it sends, in stages, and what it keeps; from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from thinwire.comm.compress.collective import Collective
from thinwire.comm.compress.collectives import AllGather, Balanced, Hierarchical, LeaderIndices, LowRankMean, TwoShot
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.rand_k import RandK
from thinwire.comm.compress.joined import Joined
from thinwire.comm.forecast import Coding, codec_label
from thinwire.comm.two_shot import TwoShotMean


@dataclass(frozen=True)
class Stage:
    """Part of a call that begins when the part before has ended.

    Attributes:
        sent_bytes: by this rank, by receiver.
        shots: messages that come one after another.
        coding: on this rank.
        exact: whether sent_bytes is known before the call.
    """

    sent_bytes: Mapping[int, int]
    shots: int
    coding: tuple[Coding, ...] = ()
    exact: bool = True

    @property
    def messages(self) -> int:
        """That this rank sends."""
        return self.shots * len(self.sent_bytes)


@dataclass(frozen=True)
class Lane:
    """Tensors of a group that are exchanged in one call.

    Attributes: shapes, by name; collective, TwoShotMean where they go dense.
    """

    shapes: Mapping[str, torch.Size]
    collective: Collective | TwoShotMean

    @property
    def numel(self) -> int:
        """Elements of all its tensors."""
        return sum(shape.numel() for shape in self.shapes.values())

    def sent_bytes(self, rank: int, size: int) -> dict[int, int]:
        """Payload bytes by receiver: exact, or of the last call, or expected; see Collective."""
        if isinstance(self.collective, TwoShotMean):
            return self.collective.sent_bytes(self.numel, rank, size)
        return self.collective.sent_bytes(self.shapes, rank, size)

    def stages(self, rank: int, size: int, *, fused: bool) -> list[Stage]:
        """The call as parts that come one after another; together they send sent_bytes().

        Codings count elements of the tensors, not of what is kept of them. Those of the few values that leader_indices
        and balanced round by themselves are left out.

        Args:
            fused: whether the encoder also writes what is left over, so that nobody need decode it again.
        """
        sent, count = self.sent_bytes(rank, size), len(self.shapes)
        match self.collective:
            case TwoShotMean():
                return [Stage(sent, 2)]
            case Joined():
                return Lane(self.collective.joined(self.shapes), self.collective.inner).stages(rank, size, fused=False)
            case Hierarchical():
                inner, outer, peers = self.collective.parts(self.shapes, rank, size)
                if not outer:
                    return [Stage(inner, 2)]
                between = Lane(outer, self.collective.outer).stages(peers.index(rank), len(peers), fused=False)
                renamed = [{peers[r]: count for r, count in stage.sent_bytes.items()} for stage in between]
                return [
                    Stage(inner, 2),
                    *(Stage(to, s.shots, s.coding, s.exact) for to, s in zip(renamed, between, strict=True)),
                ]
            case LowRankMean():
                alike = len(set(self.shapes.values()))
                coding = self._coding(self.collective.settings, self.numel, self.numel, alike, alike)
                return [Stage(sent, 2 * self.collective.means(self.shapes), coding)]
            case LeaderIndices():
                drawn = isinstance(self.collective.compressor, RandK)
                coding = self._coding(self.collective.compressor, self.numel, 0, count, 0)
                return [Stage(sent, 2 if drawn else 5, coding, exact=drawn)]
            case Balanced():
                coding = self._coding(self.collective.compressor, self.numel, 3 * self.numel, count, 3 * count)
                return [Stage(sent, 4, coding, exact=False)]
            case AllGather():
                codec = self.collective.compressor
                coding = self._coding(codec, self.numel, size * self.numel, count, size * count)
                return [Stage(sent, 1 if codec.fixed_size else 2, coding, codec.fixed_size)]
            case TwoShot():
                slice_numel = self.collective.splits(self.numel, size)[rank]
                again = 0 if fused else self.numel
                decoded = size * slice_numel + self.numel + again
                calls = size + 1, (2 if fused else 3) * size
                coding = self._coding(self.collective.compressor, self.numel + slice_numel, decoded, *calls)
                return [Stage(sent, 2, coding)]
            case _:
                raise AssertionError(f"{type(self.collective).__name__} is not known here")

    def kept_bytes(self, rank: int, size: int) -> int:
        """What the collective remembers of these tensors between steps."""
        match self.collective:
            case Joined():
                return Lane(self.collective.joined(self.shapes), self.collective.inner).kept_bytes(rank, size)
            case LowRankMean() | TwoShot():
                return self.collective.kept_bytes(self.shapes, rank, size)
            case _:
                return 0

    def _coding(self, codec: Compressor, encoded: int, decoded: int, encodes: int, decodes: int) -> tuple[Coding, ...]:
        return (Coding(codec_label(codec), encoded, decoded, encodes, decodes, handled=self.numel),)

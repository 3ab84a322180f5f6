"""Encoding and decoding of partition's formats, as its exchanges do them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from thinwire.comm.partition.wires.gradients import Int4Gradients, Int8Gradients, PlainGradients
from thinwire.comm.partition.wires.label import wire_label, wire_of
from thinwire.comm.partition.wires.weights import (
    Int8Weights,
    WeightDifferences,
    build_gather_wire,
    build_update_wire,
)

Works: TypeAlias = tuple[Callable[[], object], Callable[[], object]]
"""Encode, and decode what was encoded."""

EVERY = (
    wire_label("gradients", Int8Gradients()),
    wire_label("gradients", Int4Gradients(rounding="stochastic")),
    wire_label("update", WeightDifferences()),
)
"""What a plan offers, and what is often chosen."""


def works_of(label: str, numel: int, size: int, device: torch.device) -> Works | None:
    """What to time of a format; None where the label is none of a format that encodes.

    Args:
        numel: elements that are encoded, and as many decoded; a multiple of `size`.
        size: ranks that gradients are exchanged among: slices, and payloads that are added.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(numel, generator=generator).to(device)
    match wire_of(label):
        case "gradients", (PlainGradients() | Int4Gradients() | Int8Gradients()) as settings:
            wire, counts = settings.build(), [numel // size] * size
            payloads = wire.encode(values, counts, key=0).view(size, -1)
            total = torch.empty(numel // size, device=device)
            return (
                lambda: wire.encode(values, counts, key=0),
                lambda: wire.reduce(payloads, total, scale=1.0),
            )
        case "update", (Int8Weights() | WeightDifferences()) as settings:
            update, old = build_update_wire(settings), torch.zeros_like(values)
            payload = update.encode(values, old, key=0)
            return lambda: update.encode(values, old, key=0), lambda: update.apply(payload, old)
        case "gather", Int8Weights() as settings:
            gather, out = build_gather_wire(settings), torch.empty_like(values)
            assert gather is not None
            gathered = gather.encode(values, [numel], key=0)
            return lambda: gather.encode(values, [numel], key=0), lambda: gather.decode(gathered, out)
        case _:
            return None

"""Passes over the values that two steps of an exchange would make, in one where the formats are block codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.partition.wires.quantized import QuantizedWire
from thinwire.comm.partition.wires.wire import Wire
from thinwire.kernels.block_payload import Runs, plain_runs
from thinwire.kernels.reduce_payloads import recode_payloads


def gathered(source: Tensor, order: Runs | None) -> Tensor:
    """A source's values in an order, fp32; the source itself where there is none."""
    if order is None:
        return source
    pieces = [source[at : at + length] for at, _, length in order.pieces(0, order.numel)]
    return torch.cat([source[:0], *pieces]).to(torch.float32)


def encode_in_order(
    source: Tensor, wire: Wire, counts: Sequence[int], order: Runs | None, *, key: int, memory: Tensor | None
) -> Tensor:
    """wire.encode() of gathered(source, order): the same bits.

    Args:
        order: runs as long as `counts`; None = as they are.
        counts, key, memory: as of Wire.encode.
    """
    assert order is None or order.counts == tuple(counts), (order, counts)
    if order is not None and isinstance(wire, QuantizedWire):
        return wire.codes.encode(source, order, key=key, memory=memory)
    return wire.encode(gathered(source, order), counts, key=key, memory=memory)


def encode_sum(
    received: Tensor, wire: Wire, into: Wire, counts: Sequence[int], *, key: int, memory: Tensor | None
) -> Tensor:
    """into.encode() of the sum of payloads: the same bits.

    Args:
        received: uint8 (n, wire.payload_bytes(sum(counts))).
        wire: their format.
        counts, key, memory: as of Wire.encode.
    """
    if isinstance(wire, QuantizedWire) and isinstance(into, QuantizedWire):
        codes, runs = into.codes, plain_runs(tuple(counts))
        return recode_payloads(
            received, wire.codes.form, runs, codes.form, rounding=codes.rounding, key=key, memory=memory
        )
    return into.encode(sum_of(received, wire, sum(counts)), counts, key=key, memory=memory)


def sum_of(received: Tensor, wire: Wire, numel: int) -> Tensor:
    """What payloads (n, wire.payload_bytes(numel)) add up to: fp32 (numel,)."""
    total = torch.empty(numel, dtype=torch.float32, device=received.device)
    if numel:
        wire.reduce(received, total, scale=1.0)
    return total

"""Values of any kind as block codes: gradients of a hop, or weights that are gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.partition.wires.block_codes import BlockCodes, plain_runs
from thinwire.comm.partition.wires.wire import Wire
from thinwire.kernels.block_payload import Runs
from thinwire.kernels.reduce_payloads import recode_payloads, reduce_payloads


class QuantizedWire:
    """Every run begins blocks of its own, so that whoever gets one run alone can decode it."""

    def __init__(self, codes: BlockCodes) -> None:
        self.codes = codes

    def payload_bytes(self, numel: int) -> int:
        return self.codes.payload_bytes(numel)

    def encode(self, values: Tensor, counts: Sequence[int], *, key: int, memory: Tensor | None = None) -> Tensor:
        return self.codes.encode(values, plain_runs(tuple(counts)), key=key, memory=memory)

    def encode_in_order(self, source: Tensor, runs: Runs, *, key: int) -> Tensor:
        """encode() of values that lie in a source in another order, in one pass."""
        return self.codes.encode(source, runs, key=key)

    def reduce(self, payloads: Tensor, out: Tensor, *, scale: float) -> None:
        reduce_payloads(payloads, self.codes.form, out, scale=scale)

    def decode(self, payload: Tensor, out: Tensor) -> None:
        reduce_payloads(payload[None], self.codes.form, out)


def encode_sum(
    received: Tensor,
    wire: Wire,
    sent_on: Wire,
    counts: Sequence[int],
    *,
    key: int,
    memory: Tensor | None = None,
) -> Tensor:
    """What sent_on.encode() makes of the sum of payloads: the same bits, in one pass if both formats are block codes.

    Args:
        received: uint8 (n, wire.payload_bytes(sum(counts))).
        wire: their format.
        counts, key, memory: as of Wire.encode.
    """
    if isinstance(wire, QuantizedWire) and isinstance(sent_on, QuantizedWire):
        codes, runs = sent_on.codes, plain_runs(tuple(counts))
        return recode_payloads(
            received, wire.codes.form, runs, codes.form, rounding=codes.rounding, key=key, memory=memory
        )
    values = torch.empty(sum(counts), dtype=torch.float32, device=received.device)
    if values.numel():
        wire.reduce(received, values, scale=1.0)
    return sent_on.encode(values, counts, key=key, memory=memory)

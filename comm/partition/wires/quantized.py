"""Values of any kind as block codes: gradients of a hop, or weights that are gathered."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from thinwire.comm.partition.wires.block_codes import BlockCodes
from thinwire.kernels.block_payload import plain_runs
from thinwire.kernels.reduce_payloads import reduce_payloads


class QuantizedWire:
    """Every run begins blocks of its own, so that whoever gets one run alone can decode it."""

    def __init__(self, codes: BlockCodes) -> None:
        self.codes = codes

    def payload_bytes(self, numel: int) -> int:
        return self.codes.payload_bytes(numel)

    def encode(self, values: Tensor, counts: Sequence[int], *, key: int, memory: Tensor | None = None) -> Tensor:
        return self.codes.encode(values, plain_runs(tuple(counts)), key=key, memory=memory)

    def reduce(self, payloads: Tensor, out: Tensor, *, scale: float) -> None:
        reduce_payloads(payloads, self.codes.form, out, scale=scale)

    def decode(self, payload: Tensor, out: Tensor) -> None:
        reduce_payloads(payload[None], self.codes.form, out)

"""Values of any kind as block codes: gradients of a hop, or weights that are gathered."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.partition.wires.block_codes import BlockCodes


class QuantizedWire:
    """Every run begins blocks of its own, so that whoever gets one run alone can decode it."""

    def __init__(self, codes: BlockCodes) -> None:
        self.codes = codes

    def payload_bytes(self, numel: int) -> int:
        return self.codes.payload_bytes(numel)

    def encode(self, values: Tensor, counts: Sequence[int], *, key: int, memory: Tensor | None = None) -> Tensor:
        sizes = [self.codes.payload_bytes(count) for count in counts]
        payload = torch.zeros(sum(sizes), dtype=torch.uint8, device=values.device)
        start = 0
        for count, part in zip(counts, payload.split(sizes), strict=True):
            if count:
                left_out = None if memory is None else memory[start : start + count]
                self.codes.encode(values[start : start + count], part, key=key, offset=start, memory=left_out)
            start += count
        return payload

    def reduce(self, payloads: Tensor, out: Tensor, *, scale: float) -> None:
        self.codes.reduce(payloads, out, scale=scale)

    def decode(self, payload: Tensor, out: Tensor) -> None:
        out.copy_(self.codes.decode(payload, out.numel()))

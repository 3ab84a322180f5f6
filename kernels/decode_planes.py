"""Decode planes of codes and scales on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.kernels.code_planes import (
    check_plane,
    codes_bytes,
    decode_reference,
    decode_tile,
    needs_reference,
    scales_count,
    tile_elements,
    tiles,
)
from thinwire.kernels.quantize_on_gpu import launch_reduce


def decode_planes(
    kernel: str, codes: Tensor, scales: Tensor, *, bits: int, block: int, numel: int, out: Tensor | None
) -> Tensor:
    """Code times scale, fp32 (numel,); `kernel` is who asks."""
    if out is None:
        out = torch.empty(numel, dtype=torch.float32, device=codes.device)
    check_plane(kernel, "codes", codes, (codes_bytes(numel, bits),), codes.device, torch.uint8)
    check_plane(kernel, "scales", scales, (scales_count(numel, block),), codes.device, torch.float32)
    check_plane(kernel, "out", out, (numel,), codes.device, torch.float32)
    if needs_reference(kernel, codes.device, block):
        return out.copy_(decode_reference(codes, scales, bits=bits, block=block, numel=numel))
    if codes.device.type == "cuda":
        if numel:
            launch_reduce(codes[None], scales[None], out, None, numel=numel, factor=1.0, bits=bits, block=block)
        return out
    for start, stop in tiles(numel, block, tile_elements(numel, block)):
        decode_tile(
            codes[codes_bytes(start, bits) : codes_bytes(stop, bits)],
            scales[start // block : scales_count(stop, block)],
            bits=bits,
            block=block,
            out=out[start:stop],
        )
    return out

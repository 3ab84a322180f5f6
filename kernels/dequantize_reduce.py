"""Sum of n quantised payloads in fp32, in rank order, in one pass; and the sum quantised again in the same pass."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.kernels.block_quantize import BITS, BlockTile, Rounding, check_rounding, quantize_reference
from thinwire.kernels.code_planes import (
    check_block,
    check_plane,
    codes_bytes,
    decode_reference,
    decode_tile,
    needs_reference,
    plane_parts,
    planes_for,
    scales_count,
    tile_elements,
    tiles,
)
from thinwire.kernels.quantize_on_gpu import launch_reduce
from thinwire.kernels.sign_quantize import SignTile, quantize_sign_reference


def dequantize_reduce(
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    block: int = 256,
    numel: int,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The scaled sum of what the payloads decode to, fp32 (numel,), the same bits on every device.

    out = (((d[0] + d[1]) + d[2]) + ... + d[n-1]) scale, with d[r]_i = code[r]_i (weights[r] scales[r]_block);
    everything is rounded to fp32 by itself.

    Args:
        codes: (n, ceil(numel bits / 8)), uint8, contiguous, as written by quantize or, with one bit, quantize_sign.
        scales: (n, ceil(numel / block)), fp32, contiguous.
        bits: of a code: 8, 4, 2, or 1 for signs.
        scale: multiplies the sum once, as fp32; 1/n makes a mean.
        weights: one factor for each payload, as fp32.
        out: where to write the sum; otherwise new memory. On no memory of the payloads.

    Raises:
        ValueError: arguments other than these.
    """
    codes, scales, factor = _checked("dequantize_reduce", codes, scales, bits, block, numel, scale, weights)
    if out is None:
        out = torch.empty(numel, dtype=torch.float32, device=codes.device)
    check_plane("dequantize_reduce", "out", out, (numel,), codes.device, torch.float32)
    if needs_reference("dequantize_reduce", codes.device, block):
        return out.copy_(_sum_reference(codes, scales, bits, block, numel, factor))
    if codes.device.type == "cuda":
        if numel:
            launch_reduce(codes, scales, out, None, numel=numel, factor=factor, bits=bits, block=block)
        return out
    step = tile_elements(numel, block)
    summing = _SumTile(step, codes, scales, bits, block, factor)
    for start, stop in tiles(numel, block, step):
        summing.sum(start, stop, out[start:stop])
    return out


def dequantize_reduce_quantize(
    codes: Tensor,
    scales: Tensor,
    *,
    bits: int,
    block: int = 256,
    numel: int,
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    rounding: Rounding = "nearest",
    key: int = 0,
    offset: int = 0,
    out_codes: Tensor | None = None,
    out_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dequantize_reduce`, quantised again with the same bits and block, without writing the sum to memory.

    Args:
        codes, scales, bits, block, numel, scale, weights: as of `dequantize_reduce`.
        rounding, key, offset: as of `quantize`; signs have no use for them.
        out_codes, out_scales: where to write the planes of the sum; otherwise new memory.

    Raises:
        ValueError: arguments other than these.
    """
    name = "dequantize_reduce_quantize"
    codes, scales, factor = _checked(name, codes, scales, bits, block, numel, scale, weights)
    check_rounding(name, rounding, key, offset)
    out_codes, out_scales = planes_for(name, numel, codes.device, bits, block, out_codes, out_scales)
    if needs_reference(name, codes.device, block):
        total = _sum_reference(codes, scales, bits, block, numel, factor)
        if bits == 1:
            made = quantize_sign_reference(total, block=block)
        else:
            made = quantize_reference(total, bits=bits, block=block, rounding=rounding, key=key, offset=offset)
        out_codes.copy_(made[0])
        out_scales.copy_(made[1])
    elif codes.device.type == "cuda" and numel:
        launch_reduce(
            codes,
            scales,
            out_codes,
            out_scales,
            numel=numel,
            factor=factor,
            bits=bits,
            block=block,
            stochastic=rounding == "stochastic",
            key=key,
            offset=offset,
        )
    elif numel:
        step = tile_elements(numel, block)
        summing, scratch = _SumTile(step, codes, scales, bits, block, factor), torch.empty(step)
        signs = SignTile(step, block) if bits == 1 else None
        numbers = None if bits == 1 else BlockTile(step, bits, block, rounding, key)
        for start, stop in tiles(numel, block, step):
            total = scratch[: stop - start]
            summing.sum(start, stop, total)
            planes = plane_parts(out_codes, out_scales, bits, block, start, stop)
            if signs is not None:
                signs.write(total, *planes)
            if numbers is not None:
                numbers.write(total, offset + start, *planes)
    return out_codes, out_scales


class _SumTile:
    """Sums up to `most` elements at a time on the CPU, in memory that is allocated once."""

    def __init__(self, most: int, codes: Tensor, scales: Tensor, bits: int, block: int, factor: float) -> None:
        self._codes, self._scales, self._bits, self._block, self._factor = codes, scales, bits, block, factor
        self._decoded = torch.empty(most)

    def sum(self, start: int, stop: int, out: Tensor) -> None:
        """Write the sum of elements start to stop, a span of `tiles`, to `out`."""
        codes, scales = plane_parts(self._codes, self._scales, self._bits, self._block, start, stop)
        decoded = self._decoded[: stop - start]
        decode_tile(codes[0], scales[0], bits=self._bits, block=self._block, out=out)
        for row, of_row in zip(codes[1:], scales[1:], strict=True):
            decode_tile(row, of_row, bits=self._bits, block=self._block, out=decoded)
            out.add_(decoded)
        if self._factor != 1.0:
            out.mul_(self._factor)


def _sum_reference(codes: Tensor, scales: Tensor, bits: int, block: int, numel: int, factor: float) -> Tensor:
    total = decode_reference(codes[0], scales[0], bits=bits, block=block, numel=numel)
    for row, of_row in zip(codes[1:], scales[1:], strict=True):
        total = total + decode_reference(row, of_row, bits=bits, block=block, numel=numel)
    return total * factor


def _checked(
    kernel: str,
    codes: Tensor,
    scales: Tensor,
    bits: int,
    block: int,
    numel: int,
    scale: float,
    weights: Sequence[float] | None,
) -> tuple[Tensor, Tensor, float]:
    """The payloads that count, with their weights in the scales, and the factor as fp32."""
    check_block(kernel, bits, block, (*BITS, 1))
    if codes.dim() != 2 or codes.shape[0] == 0:
        raise ValueError(f"{kernel}: codes has shape {tuple(codes.shape)}; it must be (n, bytes) with n >= 1")
    n = codes.shape[0]
    check_plane(kernel, "codes", codes, (n, codes_bytes(numel, bits)), codes.device, torch.uint8)
    check_plane(kernel, "scales", scales, (n, scales_count(numel, block)), codes.device, torch.float32)
    factor = ctypes.c_float(scale).value
    if not math.isfinite(factor):
        raise ValueError(f"{kernel}: scale is {scale}; it must be a finite fp32 number")
    if weights is None:
        return codes, scales, factor
    if len(weights) != n or not all(math.isfinite(ctypes.c_float(weight).value) for weight in weights):
        raise ValueError(f"{kernel}: weights is {weights}; it must be {n} finite fp32 numbers, one for each payload")
    weighed = torch.tensor(weights, dtype=torch.float32, device=scales.device)
    return codes, scales * weighed[:, None], factor

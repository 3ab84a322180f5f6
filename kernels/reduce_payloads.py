"""Sum payloads of block codes in their order, in fp32; and encode the sum for the next hop in the same pass."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from thinwire.kernels.block_payload import BlockFormat, Runs
from thinwire.kernels.block_quantize import Rounding
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
from thinwire.kernels.encode_runs import (
    RunTile,
    check_payload,
    check_values,
    encode_runs,
    encode_runs_reference,
)
from thinwire.kernels.hadamard import ORDER, HadamardTile, hadamard_reference
from thinwire.kernels.reduce_payloads_on_gpu import launch_recode, launch_sum


def reduce_payloads(payloads: Tensor, form: BlockFormat, out: Tensor, *, scale: float = 1.0) -> Tensor:
    """out = scale (((d[0] + d[1]) + d[2]) + ...), with d[r] what payload r says: the same bits on every device.

    Where the format is smooth, the scaled sum of the codes' values is transformed once, and then multiplied by 1/32.
    Everything is rounded to fp32 by itself, and the result to the dtype of `out`.

    Args:
        payloads: uint8 (n, form.payload_bytes(out.numel())), contiguous, at 16 bytes.
        out: fp32, bf16 or fp16, flat, contiguous; on no memory of the payloads.
        scale: as fp32.

    Raises:
        ValueError: arguments other than these.
    """
    factor = check_payloads("reduce_payloads", payloads, form, out.numel(), scale)
    check_values("reduce_payloads", "out", out, payloads.device)
    if not out.numel():
        return out
    if needs_reference("reduce_payloads", out.device, form.block):
        return out.copy_(reduce_reference(payloads, form, out.numel(), factor))
    if out.device.type == "cuda":
        launch_sum(payloads, form, out, factor=factor)
        return out
    for start, stop, total in sums_of(payloads, form, out.numel(), factor):
        out[start:stop] = total
    return out


def recode_payloads(
    payloads: Tensor,
    form: BlockFormat,
    runs: Runs,
    into: BlockFormat,
    *,
    scale: float = 1.0,
    rounding: Rounding = "nearest",
    key: int = 0,
    memory: Tensor | None = None,
    payload: Tensor | None = None,
) -> Tensor:
    """`reduce_payloads` and `encode_runs` of the sum, without writing the sum to memory.

    What stands between two hops of a hierarchical reduce-scatter; other bits, block and transform may go out than came
    in. DeepSpeed's kernel (Wang et al. 2023, 2306.10209) adds in fp16 and keeps the format; here it is fp32.

    Args:
        payloads, form, scale: as of reduce_payloads.
        runs: of the sum, without segments.
        into: the format of what is written.
        rounding, key, memory, payload: as of encode_runs.

    Raises:
        ValueError: arguments other than these.
    """
    name = "recode_payloads"
    factor = check_payloads(name, payloads, form, runs.numel, scale)
    payload = check_payload(name, runs, into, rounding, key, payload, payloads.device)
    if not runs.is_plain:
        raise ValueError(f"{name}: runs has segments, but a sum has nothing between its values; give counts alone")
    if memory is not None:
        check_plane(name, "memory", memory, (runs.numel,), payloads.device, torch.float32)
    if not runs.numel:
        return payload
    if needs_reference(name, payloads.device, form.block) or needs_reference(name, payloads.device, into.block):
        total = reduce_reference(payloads, form, runs.numel, factor)
        return payload.copy_(encode_runs_reference(total, runs, into, rounding=rounding, key=key, memory=memory))
    if payloads.device.type == "cuda":
        # What has been transformed 32 by 32 can only be cut there.
        if not form.smooth or all(start % ORDER == 0 for start in runs.starts):
            launch_recode(
                payloads,
                form,
                runs,
                into,
                payload,
                factor=factor,
                memory=memory,
                stochastic=rounding == "stochastic",
                key=key,
            )
            return payload
        total = torch.empty(runs.numel, device=payloads.device)
        launch_sum(payloads, form, total, factor=factor)
        return encode_runs(total, runs, into, rounding=rounding, key=key, memory=memory, payload=payload)
    step = tile_elements(max(runs.counts), into.block)
    tile, summing = (
        RunTile(step, into, rounding, key),
        _SumTile(step + 2 * form.block, payloads, form, runs.numel, factor),
    )
    for place, count, part in runs.payloads(payload, into):
        tile.begin(part, count)
        for start, stop in tiles(count, into.block, step):
            values = summing.sum(place + start, place + stop)
            if memory is not None:
                values = memory[place + start : place + stop].add_(values)
            tile.write(values, start, place + start, keep_error=memory is not None)
    return payload


def reduce_reference(payloads: Tensor, form: BlockFormat, numel: int, factor: float) -> Tensor:
    """The definition of `reduce_payloads`: fp32 (numel,)."""
    coded, total = form.coded(numel), None
    for payload in payloads:
        decoded = decode_reference(*form.planes(payload, numel), bits=form.bits, block=form.block, numel=coded)
        total = decoded if total is None else total + decoded
    assert total is not None
    total = total * factor
    return hadamard_reference(total)[:numel] * (1 / ORDER) if form.smooth else total


class _SumTile:
    """Sums spans of up to `most` values on the CPU, in memory that is allocated once."""

    def __init__(self, most: int, payloads: Tensor, form: BlockFormat, numel: int, factor: float) -> None:
        self._codes, self._scales = form.planes(payloads, numel)
        self._form, self._numel, self._factor = form, numel, factor
        self._total, self._decoded = torch.empty(most), torch.empty(most)
        self._smooth = HadamardTile(most) if form.smooth else None

    def sum(self, start: int, stop: int) -> Tensor:
        """Values start, ..., stop - 1, which are valid until the next call; any span that, in whole blocks, fits."""
        form = self._form
        first, last = (
            start // form.block * form.block,
            min(-(-stop // form.block) * form.block, form.coded(self._numel)),
        )
        total = self._total[: last - first]
        for row, (codes, scales) in enumerate(zip(self._codes, self._scales, strict=True)):
            into = self._decoded[: last - first] if row else total
            self._decode(codes, scales, first, last, into)
            if row:
                total.add_(into)
        if self._factor != 1.0:
            total.mul_(self._factor)
        if self._smooth is not None:
            self._smooth.transform(total, total)
            total.mul_(1 / ORDER)
        return total[start - first : stop - first]

    def _decode(self, codes: Tensor, scales: Tensor, first: int, last: int, out: Tensor) -> None:
        bits, block = self._form.bits, self._form.block
        for start, stop in tiles(last - first, block, max(last - first, block)):
            decode_tile(
                codes[codes_bytes(first + start, bits) : codes_bytes(first + stop, bits)],
                scales[(first + start) // block : scales_count(first + stop, block)],
                bits=bits,
                block=block,
                out=out[start:stop],
            )


def sums_of(payloads: Tensor, form: BlockFormat, numel: int, factor: float) -> Iterator[tuple[int, int, Tensor]]:
    """Spans that cover all values, and their sums."""
    step = tile_elements(numel, form.block)
    summing = _SumTile(step, payloads, form, numel, factor)
    for start in range(0, numel, step):
        stop = min(start + step, numel)
        yield start, stop, summing.sum(start, stop)


def check_payloads(kernel: str, payloads: Tensor, form: BlockFormat, numel: int, scale: float) -> float:
    """The scale as fp32."""
    n = payloads.shape[0] if payloads.dim() == 2 else 0
    if n < 1:
        raise ValueError(f"{kernel}: payloads has shape {tuple(payloads.shape)}; it must be (n, bytes) with n >= 1")
    check_plane(kernel, "payloads", payloads, (n, form.payload_bytes(numel)), payloads.device, torch.uint8)
    if payloads.data_ptr() % 16:
        raise ValueError(f"{kernel}: payloads does not begin at a multiple of 16 bytes; slice it at one")
    factor = ctypes.c_float(scale).value
    if not math.isfinite(factor):
        raise ValueError(f"{kernel}: scale is {scale}; it must be a finite fp32 number")
    return factor

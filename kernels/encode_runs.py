"""Quantise runs of values into payloads in one pass, reading them in the order of their owners from where they are."""

from __future__ import annotations

import torch
from torch import Tensor

from thinwire.kernels.block_payload import BlockFormat, Runs
from thinwire.kernels.block_quantize import BlockTile, Rounding, check_rounding, quantize_reference
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
from thinwire.kernels.encode_runs_on_gpu import launch_encode
from thinwire.kernels.hadamard import ORDER, HadamardTile, hadamard_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def encode_runs(
    source: Tensor,
    runs: Runs,
    form: BlockFormat,
    *,
    rounding: Rounding = "nearest",
    key: int = 0,
    memory: Tensor | None = None,
    payload: Tensor | None = None,
) -> Tensor:
    """Every run quantised for itself, so that no block crosses from one to the next; the same bits on every device.

    What a hierarchical reduce-scatter sends: DeepSpeed's swizzled quantisation (Wang et al. 2023, 2306.10209), for
    slices of any lengths instead of equal ones. With memory e: c <- x + e is quantised, and e <- c - decoded(c), which
    is Seide et al. (2014). Every operation is rounded to fp32 by itself.

    A block with a value that is not finite decodes to nothing finite, and neither is its error: check before.

    Args:
        source: fp32, bf16 or fp16, flat, contiguous; left as it is.
        runs: what it holds, and in which order it is written.
        rounding, key: as of block_quantize.quantize; the place of a random number is that of the value in the runs.
        memory: fp32 (runs.numel,), in the order of the runs.
        payload: where to write, uint8 (runs.payload_bytes(form),), at 16 bytes; otherwise new memory.

    Raises:
        ValueError: arguments other than these.
    """
    check_values("encode_runs", "source", source, source.device)
    if source.numel() < runs.source_numel:
        raise ValueError(f"encode_runs: source has {source.numel()} values; the runs reach to {runs.source_numel}")
    payload = check_payload("encode_runs", runs, form, rounding, key, payload, source.device)
    if memory is not None:
        check_plane("encode_runs", "memory", memory, (runs.numel,), source.device, torch.float32)
    if not runs.numel:
        return payload
    if needs_reference("encode_runs", source.device, form.block):
        return payload.copy_(encode_runs_reference(source, runs, form, rounding=rounding, key=key, memory=memory))
    if source.device.type == "cuda":
        launch_encode(source, runs, form, payload, memory=memory, stochastic=rounding == "stochastic", key=key)
        return payload
    step = tile_elements(max(runs.counts), form.block)
    tile, scratch = RunTile(step, form, rounding, key), torch.empty(step)
    for place, count, part in runs.payloads(payload, form):
        tile.begin(part, count)
        for start, stop in tiles(count, form.block, step):
            begin, end = place + start, place + stop
            pieces = list(runs.pieces(begin, end))
            (at, _, length), alone = pieces[0], len(pieces) == 1
            if alone and source.dtype == torch.float32:
                values = source[at : at + length]
            else:
                values = scratch[: stop - start]
                for at, to, length in pieces:
                    values[to - begin : to - begin + length] = source[at : at + length]
            if memory is not None:
                values = memory[begin:end].add_(values)
            tile.write(values, start, begin, keep_error=memory is not None)
    return payload


def encode_runs_reference(
    source: Tensor, runs: Runs, form: BlockFormat, *, rounding: Rounding, key: int, memory: Tensor | None
) -> Tensor:
    """The definition of `encode_runs`."""
    pieces = [source[at : at + length] for at, _, length in runs.pieces(0, runs.numel)]
    values = torch.cat([source[:0], *pieces]).to(torch.float32)
    if memory is not None:
        values = memory.add_(values)
    payload = torch.zeros(runs.payload_bytes(form), dtype=torch.uint8, device=source.device)
    for place, count, part in runs.payloads(payload, form):
        if not count:
            continue
        x = values[place : place + count]
        if form.smooth:
            x = hadamard_reference(torch.nn.functional.pad(x, (0, -count % ORDER)))
        made = quantize_reference(x, bits=form.bits, block=form.block, rounding=rounding, key=key, offset=place)
        for plane, of_it in zip(form.planes(part, count), made, strict=True):
            plane.copy_(of_it)
        if memory is not None:
            decoded = decode_reference(*made, bits=form.bits, block=form.block, numel=x.numel())
            if form.smooth:
                decoded = hadamard_reference(decoded) * (1 / ORDER)
            memory[place : place + count] -= decoded[:count]
    return payload


class RunTile:
    """Writes runs up to `most` values at a time on the CPU, in memory that is allocated once."""

    def __init__(self, most: int, form: BlockFormat, rounding: Rounding, key: int) -> None:
        self._form = form
        self._blocks = BlockTile(most, form.bits, form.block, rounding, key)
        self._smooth = HadamardTile(most) if form.smooth else None
        self._values = torch.empty(most if form.smooth else 0)

    def begin(self, payload: Tensor, count: int) -> None:
        """Start a run of so many values."""
        form = self._form
        self._codes, self._scales = form.planes(payload, count)
        payload[4 * len(self._scales) : form.scales_bytes(count)] = 0
        payload[form.scales_bytes(count) + len(self._codes) :] = 0

    def write(self, x: Tensor, start: int, place: int, *, keep_error: bool = False) -> None:
        """Write the run's values from `start`, a span of `tiles`; keep_error leaves x - decoded in x."""
        form, stop = self._form, start + x.numel()
        values = x
        if self._smooth is not None:
            values = self._values[: -(-x.numel() // ORDER) * ORDER]
            padded = x
            if len(x) < len(values):
                padded = torch.nn.functional.pad(x, (0, len(values) - len(x)))
            self._smooth.transform(padded, values)
        codes = self._codes[codes_bytes(start, form.bits) : codes_bytes(start + values.numel(), form.bits)]
        scales = self._scales[scales_count(start, form.block) : scales_count(stop, form.block)]
        self._blocks.write(values, place, codes, scales, keep_error=keep_error and self._smooth is None)
        if keep_error and self._smooth is not None:
            decode_tile(codes, scales, bits=form.bits, block=form.block, out=values)
            self._smooth.transform(values, values)
            x.sub_(values.mul_(1 / ORDER)[: x.numel()])


def check_values(kernel: str, name: str, values: Tensor, device: torch.device) -> None:
    """Raises ValueError unless these are flat values of a dtype that the kernels know."""
    if values.dtype not in FLOATS or values.dim() != 1 or not values.is_contiguous() or values.device != device:
        raise ValueError(
            f"{kernel}: {name} is {values.dtype}, of shape {tuple(values.shape)}, on {values.device}; it must be flat "
            f"and contiguous, of fp32, bf16 or fp16, on {device}"
        )


def check_payload(
    kernel: str,
    runs: Runs,
    form: BlockFormat,
    rounding: str,
    key: int,
    payload: Tensor | None,
    device: torch.device,
) -> Tensor:
    """The payload to write."""
    check_rounding(kernel, rounding, key, 0)
    size = runs.payload_bytes(form)
    if payload is None:
        return torch.empty(size, dtype=torch.uint8, device=device)
    check_plane(kernel, "payload", payload, (size,), device, torch.uint8)
    if payload.data_ptr() % 16:
        raise ValueError(f"{kernel}: payload does not begin at a multiple of 16 bytes; slice it at one")
    return payload

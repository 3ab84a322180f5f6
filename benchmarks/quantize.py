"""Quantising: share of the memory's speed that it reaches, and how many times as long naive eager PyTorch takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from runner import Row, arguments, copying, measure, report
from torch import Tensor

from thinwire.kernels.block_quantize import (
    dequantize,
    quantize,
    quantize_reference,
    quantize_with_feedback,
)
from thinwire.kernels.dequantize_reduce import dequantize_reduce_quantize
from thinwire.kernels.sign_quantize import quantize_sign, quantize_sign_reference, quantize_sign_with_feedback

BLOCK = 256
NUMEL = {"cpu": 1 << 24, "cuda": 1 << 28}  # far more bytes than the caches of such a device hold
RANKS = 4
LEVELS = {8: 127, 4: 7, 2: 1}
Works = tuple[str, int, Callable[[], Any], Callable[[], Any]]  # name, bytes it must move, ours, naive


def naive_quantize(x: Tensor, bits: int, noise: bool = False) -> tuple[Tensor, Tensor]:
    rows = x.view(-1, BLOCK)
    scales = rows.abs().amax(1, keepdim=True) / LEVELS[bits]
    values = rows / scales
    codes = (values + torch.rand_like(values)).floor() if noise else values.round()
    whole = codes.clamp(-LEVELS[bits], LEVELS[bits]).to(torch.int8).view(-1)
    if bits == 8:
        return whole, scales
    fields = whole.view(-1, 8 // bits) & ((1 << bits) - 1)
    packed = fields[:, 0]
    for i in range(1, 8 // bits):
        packed = packed | fields[:, i] << (bits * i)
    return packed, scales


def naive_sign(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.view(-1, BLOCK).abs().mean(1)
    places = torch.arange(8, dtype=torch.uint8, device=x.device)
    return ((x >= 0).view(-1, 8).to(torch.uint8) << places).sum(1, dtype=torch.uint8), scales


def naive_decode(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float().view(-1, BLOCK) * scales.view(-1, 1)


def naive_feedback(gradient: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = gradient + memory
    codes, scales = naive_quantize(total, 8)
    return codes, scales, total.view(-1, BLOCK) - naive_decode(codes, scales)


def naive_sign_feedback(gradient: Tensor, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = gradient + memory
    bits, scales = naive_sign(total)
    rows = total.view(-1, BLOCK)
    return bits, scales, rows - torch.where(rows >= 0, scales[:, None], -scales[:, None])


def naive_reduce(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    decoded = codes.view(torch.int8).float().view(RANKS, -1, BLOCK) * scales[:, :, None]
    return naive_quantize(decoded.mean(0).view(-1), 8)


def works(numel: int, device: torch.device) -> list[Works]:
    x = torch.randn(numel, device=device)
    memory, error, out = torch.randn_like(x), torch.empty_like(x), torch.empty_like(x)
    blocks = 4 * numel // BLOCK
    found: list[Works] = []
    for bits in (8, 4, 2):
        codes, scales = quantize(x, bits=bits)
        planes = {"bits": bits, "codes": codes, "scales": scales}
        size = 4 * numel + numel * bits // 8 + blocks
        found.append((f"int{bits}", size, _call(quantize, x, **planes), _call(naive_quantize, x, bits)))
    codes, scales = quantize(x, bits=8)
    planes = {"bits": 8, "codes": codes, "scales": scales}
    random = _call(quantize, x, rounding="stochastic", key=1, **planes)
    found.append(("int8 stochastic", 5 * numel + blocks, random, _call(naive_quantize, x, 8, noise=True)))
    feedback = _call(quantize_with_feedback, x, memory, error, **planes)
    found.append(("int8 feedback", 13 * numel + blocks, feedback, _call(naive_feedback, x, memory)))
    decode = _call(dequantize, codes, scales, bits=8, numel=numel, out=out)
    found.append(("int8 decode", 5 * numel + blocks, decode, _call(naive_decode, codes.view(torch.int8), scales)))
    signs, means = quantize_sign(x)
    size = 4 * numel + numel // 8 + blocks
    found.append(("sign", size, _call(quantize_sign, x, bits=signs, scales=means), _call(naive_sign, x)))
    sign = _call(quantize_sign_with_feedback, x, memory, error, bits=signs, scales=means)
    found.append(("sign feedback", size + 8 * numel, sign, _call(naive_sign_feedback, x, memory)))
    rows, row_scales = codes.expand(RANKS, -1).contiguous(), scales.expand(RANKS, -1).contiguous()
    options = {"bits": 8, "numel": numel, "scale": 1 / RANKS, "out_codes": codes, "out_scales": scales}
    reduce = _call(dequantize_reduce_quantize, rows, row_scales, **options)
    size = (RANKS + 1) * (numel + blocks)
    found.append((f"int8 reduce {RANKS}", size, reduce, _call(naive_reduce, rows, row_scales)))
    return found


def _call(function: Callable[..., Any], *given: Any, **named: Any) -> Callable[[], Any]:
    return lambda: function(*given, **named)


def check(device: torch.device) -> None:
    """No speed is reported of what is wrong."""
    x = torch.randn(100_003)
    expected = [quantize_reference(x, bits=8, block=BLOCK, rounding="stochastic", key=1, offset=0)]
    expected.append(quantize_sign_reference(x, block=BLOCK))
    made = [quantize(x.to(device), bits=8, rounding="stochastic", key=1), quantize_sign(x.to(device))]
    for ours, theirs in zip(made, expected, strict=True):
        if not all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=True)):
            raise SystemExit("quantising is wrong: no speed is reported")


def bench(work: Works, numel: int, device: torch.device, repeats: int) -> Row:
    name, moved_bytes, ours, naive = work
    timed: Mapping[str, Callable[[], Any]] = {
        "ours": ours,
        "copy": copying(moved_bytes, device=device),
        "naive": naive,
    }
    timing = measure(timed, device=device, repeats=repeats)
    taken_s, copy_s = timing["ours"].median_s, timing["copy"].median_s
    return {
        "work": name,
        "numel": numel,
        "ms": taken_s * 1e3,
        "fastest_ms": timing["ours"].fastest_s * 1e3,
        "moved_bytes": moved_bytes,
        "GB/s": moved_bytes / taken_s / 1e9,
        "copy_GB/s": moved_bytes / copy_s / 1e9,
        "share_of_copy": copy_s / taken_s,
        "times_naive": timing["naive"].median_s / taken_s,
    }


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.set_defaults(threads=1)  # beside a backward pass there are no idle cores
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    numel = NUMEL[device.type]
    with torch.no_grad():
        check(device)
        rows = [bench(work, numel, device, options.repeats) for work in works(numel, device)]
    report(__doc__, rows, device=device, path=options.json)


if __name__ == "__main__":
    main()

"""Kernels of hierarchical ZeRO: one pass over the values, against the passes that eager PyTorch makes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from runner import Row, arguments, copying, measure, report
from torch import Tensor

from thinwire.kernels.block_payload import BlockFormat, Runs
from thinwire.kernels.encode_runs import encode_runs, encode_runs_reference
from thinwire.kernels.hadamard import hadamard_reference
from thinwire.kernels.reduce_payloads import recode_payloads, reduce_payloads, reduce_reference
from thinwire.kernels.weight_difference import apply_difference, encode_difference

NUMEL = {"cpu": 1 << 24, "cuda": 1 << 28}  # far more bytes than the caches of such a device hold
HIDDEN = 1024
OWNERS = 16
RANKS = 4
FAST, SLOW, CHANGE = BlockFormat(8, 512), BlockFormat(4, 128, smooth=True), BlockFormat(4, 2048)
# name, bytes that one pass must move and that two passes must, ours in one pass and in two, eager PyTorch
Work = tuple[str, int, int, Callable[[], Any], Callable[[], Any], Callable[[], Any]]


def owners_order(numel: int) -> list[tuple[int, int]]:
    """Twelve matrices, of whose rows every owner has a sixteenth: stretches as FSDP2's flat gradient holds them."""
    rows = numel // HIDDEN // 12 // OWNERS * OWNERS
    return [
        ((matrix * rows + owner * rows // OWNERS) * HIDDEN, rows // OWNERS * HIDDEN)
        for owner in range(OWNERS)
        for matrix in range(12)
    ]


def naive_quantize(x: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    levels = (1 << (form.bits - 1)) - 1
    rows = (hadamard_reference(x) if form.smooth else x).view(-1, form.block)
    scales = rows.abs().amax(1, keepdim=True) / levels
    whole = (rows / scales).round().clamp(-levels, levels).to(torch.int8).view(-1)
    if form.bits == 8:
        return whole, scales
    pairs = whole.view(-1, 2) & 15
    return pairs[:, 0] | pairs[:, 1] << 4, scales


def naive_decode(codes: Tensor, scales: Tensor, form: BlockFormat) -> Tensor:
    whole = codes if form.bits == 8 else torch.stack((codes << 4 >> 4, codes >> 4), 1)
    values = (whole.view(-1, form.block).float() * scales).view(-1)
    return hadamard_reference(values) / 32 if form.smooth else values


def naive_gather(source: Tensor, segments: list[tuple[int, int]]) -> Tensor:
    return torch.cat([source[at : at + length] for at, length in segments])


def works(numel: int, device: torch.device) -> list[Work]:
    segments = owners_order(numel)
    total = sum(length for _, length in segments)
    counts = [total // RANKS] * RANKS
    in_order, plain = Runs(counts, segments), Runs(counts)
    source = torch.randn(numel, device=device)
    found: list[Work] = []
    for form in (FAST, SLOW):
        payload = torch.empty(plain.payload_bytes(form), dtype=torch.uint8, device=device)
        found.append(
            (
                f"swizzled int{form.bits}{' smooth' if form.smooth else ''}",
                4 * total + len(payload),
                12 * total + len(payload),
                partial(encode_runs, source, in_order, form, payload=payload),
                partial(_swizzle_in_two, source, segments, plain, form, payload),
                partial(_swizzle_naively, source, segments, form),
            )
        )
    values = naive_gather(source, segments)
    memory = torch.zeros_like(values)
    received = torch.stack([encode_runs(values * (r + 1), Runs([total]), FAST) for r in range(RANKS)])
    payload = torch.empty(plain.payload_bytes(SLOW), dtype=torch.uint8, device=device)
    naive = [naive_quantize(values * (r + 1), FAST) for r in range(RANKS)]
    moved = received.numel() + len(payload)
    for name, kept in ((f"int8 reduce {RANKS} to int4 smooth", None), ("the same with error memory", memory)):
        found.append(
            (
                name,
                moved + (0 if kept is None else 8 * total),
                moved + (8 if kept is None else 16) * total,
                partial(recode_payloads, received, FAST, plain, SLOW, memory=kept, payload=payload),
                partial(_recode_in_two, received, plain, payload, torch.empty_like(values), kept),
                partial(_recode_naively, naive, kept),
            )
        )
    for dtype in (torch.float32, torch.bfloat16):
        old = values.to(dtype)
        new = old.float() + 1e-3 * torch.randn_like(values)
        changed = encode_difference(new, old, CHANGE)
        planes = naive_quantize(new - old, CHANGE)
        name, size = str(dtype).removeprefix("torch."), old.element_size()
        found.append(
            (
                f"difference int4 of {name}",
                (4 + size) * total + len(changed),
                (12 + size) * total + len(changed),
                partial(encode_difference, new, old, CHANGE, payload=changed.clone()),
                partial(_difference_in_two, new, old, changed.clone()),
                lambda new=new, old=old: naive_quantize(new - old, CHANGE),
            )
        )
        found.append(
            (
                f"its application to {name}",
                2 * size * total + len(changed),
                (8 + 2 * size) * total + len(changed),
                partial(apply_difference, changed, CHANGE, old.clone()),
                partial(_apply_in_two, changed, old.clone(), torch.empty_like(values)),
                lambda planes=planes, old=old: naive_decode(*planes, CHANGE).add_(old).to(old.dtype),
            )
        )
    return found


def _swizzle_in_two(
    source: Tensor, segments: list[tuple[int, int]], plain: Runs, form: BlockFormat, payload: Tensor
) -> None:
    encode_runs(naive_gather(source, segments), plain, form, payload=payload)


def _swizzle_naively(source: Tensor, segments: list[tuple[int, int]], form: BlockFormat) -> None:
    naive_quantize(naive_gather(source, segments), form)


def _recode_in_two(received: Tensor, plain: Runs, payload: Tensor, out: Tensor, memory: Tensor | None) -> None:
    encode_runs(reduce_payloads(received, FAST, out), plain, SLOW, memory=memory, payload=payload)


def _recode_naively(received: list[tuple[Tensor, Tensor]], memory: Tensor | None) -> None:
    total = sum(naive_decode(*planes, FAST) for planes in received)
    assert isinstance(total, Tensor)
    if memory is None:
        naive_quantize(total, SLOW)
        return
    memory += total
    memory -= naive_decode(*naive_quantize(memory, SLOW), SLOW)


def _difference_in_two(new: Tensor, old: Tensor, payload: Tensor) -> None:
    encode_runs(new - old, Runs([new.numel()]), CHANGE, payload=payload)


def _apply_in_two(payload: Tensor, weights: Tensor, out: Tensor) -> None:
    weights.copy_(reduce_payloads(payload[None], CHANGE, out).add_(weights))


def check(device: torch.device) -> None:
    """No speed is reported of what is wrong."""
    segments, x = owners_order(1 << 19), torch.randn(1 << 19)
    runs = Runs([length for _, length in segments], segments)
    sent = encode_runs(x.to(device), runs, SLOW)
    one = Runs([runs.numel])
    received = torch.stack([encode_runs(x, one, FAST)] * 3)
    total = reduce_reference(received, FAST, runs.numel, 1.0)
    options: dict[str, Any] = {"rounding": "nearest", "key": 0, "memory": None}
    made = [sent, recode_payloads(received.to(device), FAST, one, SLOW)]
    expected = [encode_runs_reference(x, runs, SLOW, **options), encode_runs_reference(total, one, SLOW, **options)]
    if not all(torch.equal(a.cpu(), b) for a, b in zip(made, expected, strict=True)):
        raise SystemExit("the kernels are wrong: no speed is reported")


def bench(work: Work, numel: int, device: torch.device, repeats: int) -> Row:
    name, moved_bytes, two_bytes, ours, two_passes, naive = work
    timed = {"ours": ours, "copy": copying(moved_bytes, device=device), "two": two_passes, "naive": naive}
    timing = measure(timed, device=device, repeats=repeats)
    taken_s, copy_s = timing["ours"].median_s, timing["copy"].median_s
    return {
        "work": name,
        "numel": numel,
        "ms": taken_s * 1e3,
        "fastest_ms": timing["ours"].fastest_s * 1e3,
        "moved_bytes": moved_bytes,
        "two_passes_bytes": two_bytes,
        "GB/s": moved_bytes / taken_s / 1e9,
        "share_of_copy": copy_s / taken_s,
        "two_passes_take": timing["two"].median_s / taken_s,
        "naive_takes": timing["naive"].median_s / taken_s,
    }


def main() -> None:
    parser: argparse.ArgumentParser = arguments(__doc__)
    parser.add_argument("--numel", type=int, help="values; otherwise far more than the caches hold")
    parser.set_defaults(threads=1)  # beside a backward pass there are no idle cores
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    numel = options.numel or NUMEL[device.type]
    with torch.no_grad():
        check(device)
        rows = [bench(work, numel, device, options.repeats) for work in works(numel, device)]
    report(__doc__, rows, device=device, path=options.json)


if __name__ == "__main__":
    main()

"""Encoding with error feedback, and decoding: how many times as long eager PyTorch and torch.topk take.

    python benchmarks/encode_speed.py [--threads 1] [--kernels] [--json FILE]

Every compressor encodes gradient + memory of twelve tensors and keeps what it leaves behind, then decodes. Beside it
runs the same in PyTorch as a few lines say it, which sends int64 indices uncoded, and torch.topk of the magnitudes
alone. Times are for a million elements. On a GPU, or with --kernels, the kernels alone are measured; share_of_copy is
the time of a copy of the bytes that a kernel must at least move, over its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from runner import Row, arguments, copying, measure, report
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors import BF16, Int4, Int8, Natural, RandK, Sign, Ternary, Threshold, TopK
from thinwire.comm.compress.decoded import to_dense
from thinwire.comm.compress.draw import Draw
from thinwire.kernels.bit_pack import pack_bits, pack_bits_reference, unpack_bits, unpack_bits_reference
from thinwire.kernels.chunk_topk import chunk_top_k, chunk_top_k_reference
from thinwire.kernels.threshold_select import select_with_feedback, top_k, top_k_reference

TENSORS, SHAPE = 12, (512, 512)  # the weights of a small GPT, which stay in the last cache
DENSITY = 0.01
CHUNK, KEPT = 4096, 64
BLOCK = 256
KERNEL_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}  # more than the caches hold


@dataclass(frozen=True)
class Eager:
    """The same compression as a user would write it: encode returns what would be sent, and clears it from c."""

    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(threads=1)  # ranks that share a machine have no more
    parser.add_argument("--kernels", action="store_true", help="on a CPU too: selection and bit packing alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    with torch.no_grad():
        if device.type == "cpu" and not options.kernels:
            rows = [codec_row(*case, options.repeats) for case in CODECS]
        else:
            rows = [kernel_row(name, device, options.repeats) for name in ("select", "chunk", "pack", "unpack")]
    report(str(__doc__).splitlines()[0], rows, device=device, path=options.json)


def codec_row(name: str, compressor: Compressor, eager: Eager | None, repeats: int) -> Row:
    """Milliseconds for a million elements, and how many times as long the others take."""
    generator = torch.Generator().manual_seed(0)
    shape, draw = torch.Size(SHAPE), Draw(seed=0, step=0, name="weight", rank=0)
    gradients = [torch.randn(SHAPE, generator=generator) ** 3 for _ in range(TENSORS)]
    memories = [torch.randn(SHAPE, generator=generator) for _ in range(TENSORS)]
    left = [torch.empty(SHAPE) for _ in range(TENSORS)]
    sums = [torch.empty(SHAPE) for _ in range(TENSORS)]
    triples = list(zip(gradients, memories, left, strict=True))

    payloads = [compressor.encode_with_feedback(*triple, draw) for triple in triples]
    for (gradient, memory, rest), payload in zip(triples, payloads, strict=True):
        sent = to_dense(compressor.decode(payload, shape, draw)).view(shape)
        if not torch.allclose(sent + rest, gradient + memory, rtol=1e-5, atol=1e-5):
            raise SystemExit(f"{name}: what is sent and what is left are not the whole; no speed is reported")

    works: dict[str, Callable[[], Any]] = {
        "encode": lambda: [compressor.encode_with_feedback(*triple, draw) for triple in triples],
        "decode": lambda: [to_dense(compressor.decode(payload, shape, draw)) for payload in payloads],
        "topk": lambda: [torch.topk(x.view(-1).abs(), int(DENSITY * x.numel()), sorted=False) for x in gradients],
    }
    if eager is not None:

        def encode_all() -> list[Any]:
            for gradient, memory, total in zip(gradients, memories, sums, strict=True):
                torch.add(gradient, memory, out=total)
            return [eager.encode(total.view(-1)) for total in sums]

        messages = encode_all()
        works["eager_encode"] = encode_all
        works["eager_decode"] = lambda: [eager.decode(message) for message in messages]
    timing = measure(works, device=torch.device("cpu"), repeats=repeats, warm_up=2)
    numel = TENSORS * shape.numel()
    ms = {work: timing[work].median_s * 1e9 / numel for work in works}
    return {
        "compressor": name,
        "bits_per_element": 8 * sum(map(len, payloads)) / numel,
        "encode_ms": ms["encode"],
        "decode_ms": ms["decode"],
        "eager_encode_times": ms["eager_encode"] / ms["encode"] if eager else "-",
        "eager_decode_times": ms["eager_decode"] / ms["decode"] if eager else "-",
        "topk_times": ms["topk"] / ms["encode"],
    }


def kernel_row(kernel: str, device: torch.device, repeats: int) -> Row:
    n = KERNEL_ELEMENTS[device.type]
    x = torch.randn(n, device=device)
    memory, left = torch.randn_like(x), torch.empty_like(x)
    k = int(DENSITY * n)
    places = torch.randint(0, CHUNK, (n // 8,), device=device, dtype=torch.int32)
    packed = pack_bits(places, 12)
    head = x[: 1 << 20].cpu()
    right = {
        "select": lambda: torch.equal(top_k(head.to(device), 1000)[0].cpu(), top_k_reference(head, 1000)[0]),
        "chunk": lambda: torch.equal(chunk_top_k(head.to(device), KEPT)[0].cpu(), chunk_top_k_reference(head, KEPT)[0]),
        "pack": lambda: torch.equal(pack_bits(places[:999], 12), pack_bits_reference(places[:999], 12)),
        "unpack": lambda: torch.equal(unpack_bits(packed, 12, len(places)), places),
    }
    if not right[kernel]():
        raise SystemExit(f"{kernel} is wrong: no speed is reported")
    ours, eager, moved_bytes = {
        "select": (
            lambda: select_with_feedback(x, memory, left, k=k),
            lambda: _clear(torch.add(x, memory, out=left), k),
            12 * n + 12 * k,
        ),
        "chunk": (
            lambda: chunk_top_k(x, KEPT),
            lambda: torch.topk(x.view(-1, CHUNK).abs(), KEPT, sorted=False),
            4 * n + 8 * n * KEPT // CHUNK,
        ),
        "pack": (lambda: pack_bits(places, 12), lambda: pack_bits_reference(places, 12), 11 * len(places) // 2),
        "unpack": (
            lambda: unpack_bits(packed, 12, len(places)),
            lambda: unpack_bits_reference(packed, 12, len(places)),
            11 * len(places) // 2,
        ),
    }[kernel]
    timing = measure(
        {"ours": ours, "eager": eager, "copy": copying(moved_bytes, device=device)}, device=device, repeats=repeats
    )
    seconds = timing["ours"].median_s
    return {
        "kernel": kernel,
        "ms": seconds * 1e3,
        "moved_bytes": moved_bytes,
        "GB/s": moved_bytes / seconds / 1e9,
        "share_of_copy": timing["copy"].median_s / seconds,
        "times_eager": timing["eager"].median_s / seconds,
    }


def _clear(c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    indices = torch.topk(c.abs(), k, sorted=False).indices
    values = c[indices]
    c[indices] = 0.0
    return indices, values


def _scatter(message: tuple[Tensor, Tensor]) -> Tensor:
    indices, values = message
    dense = torch.zeros(SHAPE[0] * SHAPE[1])
    dense[indices] = values
    return dense


def _clear_chunks(c: Tensor) -> tuple[Tensor, Tensor]:
    rows = c.view(-1, CHUNK)
    indices = torch.topk(rows.abs(), KEPT, dim=1, sorted=False).indices
    values = rows.gather(1, indices)
    rows.scatter_(1, indices, 0.0)
    return indices, values


def _scatter_chunks(message: tuple[Tensor, Tensor]) -> Tensor:
    indices, values = message
    return torch.zeros(len(indices), CHUNK).scatter_(1, indices, values)


def _clear_above(c: Tensor) -> tuple[Tensor, Tensor]:
    """As DGC's code: the threshold of a sample of 1 %, then mask and nonzero."""
    magnitudes = c.abs()
    sample = magnitudes[::97]
    threshold = torch.topk(sample, max(1, int(DENSITY * len(sample)))).values[-1]
    indices = (magnitudes >= threshold).nonzero().view(-1)
    values = c[indices]
    c[indices] = 0.0
    return indices, values


def _levels(levels: int, per_byte: int) -> Eager:
    """Codes of 8 / per_byte bits with a scale for each block."""
    shifts = torch.arange(0, 8, 8 // per_byte, dtype=torch.int32)
    mask = (1 << 8 // per_byte) - 1

    def encode(c: Tensor) -> tuple[Tensor, Tensor]:
        rows = c.view(-1, BLOCK)
        scales = rows.abs().amax(1, keepdim=True) / levels
        codes = (rows / scales).round()
        rows -= codes * scales
        if per_byte == 1:
            return codes.to(torch.int8), scales
        packed = (codes.to(torch.int32).view(-1, per_byte) & mask) << shifts
        return packed.sum(1).to(torch.uint8), scales

    def decode(message: tuple[Tensor, Tensor]) -> Tensor:
        codes, scales = message
        if per_byte > 1:
            fields = codes.to(torch.int32)[:, None] >> shifts & mask
            codes = torch.where(fields > levels, fields - mask - 1, fields)
        return codes.view(-1, BLOCK) * scales

    return Eager(encode, decode)


def _signs(c: Tensor) -> tuple[Tensor, Tensor]:
    rows = c.view(-1, BLOCK)
    scales = rows.abs().mean(1, keepdim=True)
    positive = rows >= 0
    rows -= torch.where(positive, scales, -scales)
    return (positive.view(-1, 8).to(torch.int32) << torch.arange(8)).sum(1).to(torch.uint8), scales


def _from_signs(message: tuple[Tensor, Tensor]) -> Tensor:
    packed, scales = message
    positive = (packed.to(torch.int32)[:, None] >> torch.arange(8) & 1).bool().view(-1, BLOCK)
    return torch.where(positive, scales, -scales)


def _halves(c: Tensor) -> Tensor:
    half = c.bfloat16()
    c -= half.float()
    return half


SPARSE = Eager(lambda c: _clear(c, int(DENSITY * c.numel())), _scatter)
CHUNKS = Eager(_clear_chunks, _scatter_chunks)
CODECS: list[tuple[str, Compressor, Eager | None]] = [
    ("top-k 1 %", TopK(density=DENSITY), SPARSE),
    ("top-k 1 %, int8", TopK(density=DENSITY, values="int8"), SPARSE),
    ("top-k 64 of 4096", TopK(k=KEPT, chunk=CHUNK), CHUNKS),
    ("top-k 64 of 4096, 2 bits", TopK(k=KEPT, chunk=CHUNK, values="2bit"), CHUNKS),
    ("threshold 1 %", Threshold(density=DENSITY), Eager(_clear_above, _scatter)),
    ("random 1 %", RandK(density=DENSITY), None),
    ("bf16", BF16(), Eager(_halves, lambda half: half.float())),
    ("int8", Int8(), _levels(127, 1)),
    ("int8, stochastic", Int8(rounding="stochastic"), None),
    ("int4", Int4(), _levels(7, 2)),
    ("ternary", Ternary(), _levels(1, 4)),
    ("sign", Sign(), Eager(_signs, _from_signs)),
    ("natural", Natural(), None),
]


if __name__ == "__main__":
    main()

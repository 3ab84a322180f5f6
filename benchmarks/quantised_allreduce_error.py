"""Claim: a two-shot mean of quantised tensors is off by as much on 64 ranks as on 2; a ring by four times as much.

    python benchmarks/quantised_allreduce_error.py [--json FILE]

Every rank has normal numbers. The two-shot mean quantises each input once, adds the decoded ones in fp32 and quantises
the mean once. The ring quantises the partial sum anew at each of its n-1 hops, and the sum once more for everyone. Both
use the codec that the collectives use (blocks of 256, rounded to nearest). The ranks are simulated one after another,
since neither result depends on the network. The error is that of the mean in the L2 norm, relative to the exact mean;
the shrinkage is how much too small the mean is on average, 1 - <result, exact> / <exact, exact>.
"""

from __future__ import annotations

import torch
from runner import Row, arguments, report
from torch import Tensor

from thinwire.comm.compress.compressors.block_quantized import BlockQuantized, Int4, Int8
from thinwire.comm.compress.decoded import to_dense
from thinwire.comm.compress.draw import Draw

ELEMENTS = 1 << 18
RANKS = (2, 4, 8, 16, 32, 64)
_DRAW = Draw(seed=0, step=0, name="benchmark", rank=0)  # rounding to nearest draws nothing


def main() -> None:
    options = arguments(str(__doc__).splitlines()[0]).parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = [measure(compressor, ranks, device) for compressor in (Int8(), Int4()) for ranks in RANKS]
    report(str(__doc__).splitlines()[0], rows, device=device, path=options.json)


def measure(compressor: BlockQuantized, ranks: int, device: torch.device) -> Row:
    generator = torch.Generator().manual_seed(ranks)
    inputs = torch.randn(ranks, ELEMENTS, generator=generator).to(device)
    exact = inputs.double().mean(0)
    two_shot, ring = two_shot_mean(compressor, inputs).double(), ring_mean(compressor, inputs).double()
    errors = [float((result - exact).norm() / exact.norm()) for result in (two_shot, ring)]
    return {
        "codec": f"int{compressor.bits}",
        "ranks": ranks,
        "two_shot_percent": 100 * errors[0],
        "ring_percent": 100 * errors[1],
        "ratio": errors[1] / errors[0],
        "shrinkage": 1 - float(two_shot @ exact / (exact @ exact)),
        "times_smaller_than_fp32": 4 * ELEMENTS / compressor.payload_bytes(exact.shape),
    }


def two_shot_mean(compressor: BlockQuantized, inputs: Tensor) -> Tensor:
    total = torch.zeros_like(inputs[0])
    for x in inputs:
        total += coded(compressor, x)
    return coded(compressor, total / len(inputs))


def ring_mean(compressor: BlockQuantized, inputs: Tensor) -> Tensor:
    """The c-th chunk starts at rank c, and goes from rank to rank, each of which adds its own part."""
    n = len(inputs)
    chunks = inputs.view(n, n, -1)  # rank, chunk, element
    chunk = torch.arange(n, device=inputs.device)
    partial = chunks[chunk, chunk]
    for hop in range(1, n):
        partial = coded(compressor, partial) + chunks[(chunk + hop) % n, chunk]
    return coded(compressor, partial).view(-1) / n


def coded(compressor: BlockQuantized, x: Tensor) -> Tensor:
    payload = compressor.encode(x.contiguous(), _DRAW)
    return to_dense(compressor.decode(payload, x.shape, _DRAW)).view(x.shape)


if __name__ == "__main__":
    main()

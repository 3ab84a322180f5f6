"""Claim: payloads are within a few percent of the information limit, and far below what peers send for the same values.

    python benchmarks/payload_bytes.py [--steps 60] [--json FILE]

Every size is that of a whole message: header, counts, indices, scales and values. The limit is log2 C(N, k) bits for
the places, as if every set of k were equally likely, and the bits of the values alone. Real gradients cluster, and can
be below it.

    SparseLoCo   64 of each 4096 (normal) elements, 2-bit values; published 12 bits an index
    DeMo         32 of each 4096 (normal) coefficients of OLMo 1B, bf16; one tensor of each shape is encoded, and counts
                 as often as the model has it; published 8 bytes an index and 4 a value
    EF           the largest 1 % of our GPT's gradients and error memory, int8, over all steps of a training run; the
                 whole gradient together, or each tensor of 1024 or more elements; peers send int32 indices
    FedZip       the largest 1 % of a normal tensor as one of two centres; the paper gives no size at 1 %
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from runner import Row, arguments, report
from torch import Tensor

from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.ternary_cluster import TernaryCluster
from thinwire.comm.compress.compressors.top_k import TopK
from thinwire.comm.compress.decoded import to_dense
from thinwire.comm.compress.draw import Draw
from thinwire.comm.wire import pack_message
from thinwire.dist.data import Data, DataSettings
from thinwire.dist.models.gpt import GPT, GPTSettings

CHUNK = 4096
DRAW = Draw(seed=0, step=0, name="benchmark", rank=0)
LAYERS = 16
OLMO_1B = {  # shape: how many; the input embedding is the output's too
    (50304, 2048): 1,
    (6144, 2048): LAYERS,
    (2048, 2048): LAYERS,
    (16384, 2048): LAYERS,
    (2048, 8192): LAYERS,
}
SMALLEST = 1024  # elements of a tensor that is compressed by itself


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.set_defaults(device="cpu")
    parser.add_argument("--steps", type=int, default=60, help="of the training run that the gradients are taken from")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [sparse_loco(), demo(), *(error_feedback(options.steps, whole) for whole in (True, False)), fed_zip()]
    report(str(__doc__).splitlines()[0], rows, device=torch.device("cpu"), path=options.json)


def sparse_loco() -> Row:
    chunks = 1024
    tensor = normal((chunks, CHUNK))
    ours = message_bytes(TopK(k=64, chunk=CHUNK, values="2bit"), tensor) / chunks
    limit = (subset_bits(CHUNK, 64) + 64 * 2) / 8
    return row("SparseLoCo", "B / chunk", limit, ours, 77.0, 112.0, CHUNK * 4)


def demo() -> Row:
    compressor = TopK(k=32, chunk=CHUNK, values="bf16")
    elements = sum(math.prod(shape) * count for shape, count in OLMO_1B.items())
    sent = sum(message_bytes(compressor, normal(shape)) * count for shape, count in OLMO_1B.items())
    limit = elements / CHUNK * (subset_bits(CHUNK, 32) + 32 * 16) / 8
    theirs = elements / CHUNK * 32 * (8 + 4)
    return row("DeMo, OLMo 1B", "MB / step", limit / 1e6, sent / 1e6, 28.2, theirs / 1e6, elements * 4 / 1e6)


def error_feedback(steps: int, whole: bool) -> Row:
    """Train with error feedback on one worker, each step with what arrived; count what was sent."""
    compressor = TopK(density=0.01, values="int8")
    context, batch = 128, 4
    data = Data(DataSettings(), context=context, seed=1)
    model = GPT(GPTSettings(layers=4, heads=8, width=256, context=context), data.tokenizer.vocab)
    model.initialise(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    memories: dict[int, Tensor] = {}
    bits = kept = limit = 0.0
    for step in range(steps):
        windows = data.training_batch(range(step * batch, (step + 1) * batch), torch.device("cpu"))
        optimizer.zero_grad()
        F.cross_entropy(model(windows.inputs).flatten(0, 1), windows.targets.flatten()).backward()
        gradient = torch.cat([parameter.grad.view(-1) for parameter in parameters if parameter.grad is not None])
        # Views: what is written into a part is in the gradient.
        for number, part in enumerate([gradient] if whole else gradient.split(sizes)):
            if part.numel() < SMALLEST:
                continue
            memory = memories.get(number, torch.zeros_like(part))
            memories[number] = torch.empty_like(part)
            payload = compressor.encode_with_feedback(part, memory, memories[number], DRAW)
            count = compressor.expected_count(part.numel())
            bits += 8 * pack_message([payload], codec=0).numel()
            limit += subset_bits(part.numel(), count) + 8 * count
            kept += count
            part.copy_(to_dense(compressor.decode(payload, part.shape, DRAW)))
        for parameter, arrived in zip(parameters, gradient.split(sizes), strict=True):
            parameter.grad = arrived.view_as(parameter)
        optimizer.step()
    name = "EF, whole gradient" if whole else "EF, each tensor"
    return row(name, "bits / kept", limit / kept, bits / kept, 15.7 if whole else None, 32.0 + 8, 32 / 0.01)


def fed_zip() -> Row:
    tensor = normal((4_000_000,))
    kept = tensor.numel() // 100
    ours = 8 * message_bytes(TernaryCluster(density=0.01), tensor) / kept
    limit = subset_bits(tensor.numel(), kept) / kept + 1
    return row("FedZip, 1 %", "bits / kept", limit, ours, 1.03 * limit, None, 32 / 0.01)


def row(what: str, unit: str, limit: float, ours: float, most: float | None, theirs: float | None, dense: float) -> Row:
    return {
        "payload": what,
        "unit": unit,
        "limit": round(limit, 2),
        "ours": round(ours, 2),
        "claim, at most": "-" if most is None else round(most, 2),
        "ours / limit": round(ours / limit, 3),
        "theirs": "-" if theirs is None else round(theirs, 2),
        "theirs / ours": "-" if theirs is None else round(theirs / ours, 2),
        "fp32 / ours": round(dense / ours, 1),
    }


def message_bytes(compressor: Compressor, tensor: Tensor) -> int:
    """Bytes of the message about this tensor, which must be readable."""
    payload = compressor.encode(tensor, DRAW)
    compressor.decode(payload, tensor.shape, DRAW)
    return pack_message([payload], codec=0).numel()


def subset_bits(numel: int, count: int) -> float:
    """log2 of the number of sets of `count` among `numel`."""
    return (math.lgamma(numel + 1) - math.lgamma(count + 1) - math.lgamma(numel - count + 1)) / math.log(2)


def normal(shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


if __name__ == "__main__":
    main()

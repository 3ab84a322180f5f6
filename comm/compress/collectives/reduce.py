"""The owner's sum of what n payloads say about its slice: from the codes themselves where a kernel can, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thinwire.comm.compress.collectives.contribution import decode
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.compressors.block_quantized import BlockQuantized
from thinwire.comm.compress.compressors.dense import Cast
from thinwire.comm.compress.compressors.sign import Sign
from thinwire.comm.compress.decoded import add_to
from thinwire.comm.compress.draw import Draw
from thinwire.comm.finite import are_finite
from thinwire.kernels.cast_reduce import cast_reduce
from thinwire.kernels.dequantize_reduce import dequantize_reduce


def mean_of_payloads(
    compressor: Compressor, payloads: Sequence[Tensor | None], out: Tensor, draw: Draw, weights: Sequence[float]
) -> None:
    """out <- 1/n * sum over the senders r of weights[r] * decode(payloads[r]), in fp32 and in rank order.

    Args:
        payloads: of all n ranks; None of those whose weight is 0.
        out: flat, fp32.
        draw: of the slice, any rank's.
    Raises:
        PayloadError: the bytes are not such payloads.
    """
    scale = 1.0 / len(payloads)
    present = [payload for payload in payloads if payload is not None]
    alike = bool(out.numel()) and all(weight == 1.0 for weight in weights)
    if isinstance(compressor, BlockQuantized | Sign) and alike:
        planes = [compressor.checked_planes(payload, out.numel()) for payload in present]
        codes, scales = (torch.stack(same) for same in zip(*planes, strict=True))
        dequantize_reduce(
            codes, scales, bits=compressor.bits, block=compressor.block, numel=out.numel(), scale=scale, out=out
        )
        return
    if isinstance(compressor, Cast) and alike:
        cast_reduce(torch.stack([compressor.values(payload, out.numel()) for payload in present]), scale=scale, out=out)
        if are_finite([out]):
            return  # otherwise below, where it is found out whose payload is not
    out.zero_()
    for sender, (payload, weight) in enumerate(zip(payloads, weights, strict=True)):
        if payload is not None:
            add_to(out, decode(compressor, payload, out.shape, draw, sender=sender), weight)
    out.mul_(scale)

"""What a choice of compressors needs to know of this machine: its link, and how fast it encodes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from thinwire.comm.channel import Channel
from thinwire.comm.compress.compressor import Compressor
from thinwire.comm.compress.decoded import add_to
from thinwire.comm.compress.draw import Draw

_ENOUGH_S = 0.05  # a transfer of this length tells the rate of a link whatever its latency
_LARGEST_BYTES = 1 << 23


@dataclass(frozen=True)
class Link:
    """latency_s: of one collective of a few bytes. bps: bits per second that one rank sends while all do."""

    latency_s: float
    bps: float


@dataclass(frozen=True)
class CodecSpeed:
    """Seconds per element, of a tensor of a quarter of a million."""

    encode_s: float
    decode_s: float


def measure_link(channel: Channel, device: torch.device) -> Link:
    """Time small and growing all-to-alls; the slowest rank's figures, the same on every rank. A second at most.

    A world of one has a link without latency or limit.
    """
    if channel.size == 1:
        return Link(0.0, float("inf"))
    tiny = torch.zeros(channel.size, dtype=torch.uint8, device=device)
    latency_s = statistics.median(_exchange_s(channel, tiny) for _ in range(5))
    slice_bytes = 1 << 14
    while True:
        data = torch.zeros(channel.size * slice_bytes, dtype=torch.uint8, device=device)
        # Agreed on, because every rank must stop at the same size.
        taken_s = _slowest(channel, _exchange_s(channel, data), device)
        if taken_s > _ENOUGH_S or 2 * slice_bytes * channel.size > _LARGEST_BYTES:
            break
        slice_bytes *= 2
    latency_s = _slowest(channel, latency_s, device)
    sent_bits = 8 * slice_bytes * (channel.size - 1)
    return Link(latency_s, sent_bits / max(taken_s - latency_s, taken_s / 2))


def measure_codec(compressor: Compressor, device: torch.device, numel: int = 1 << 18) -> CodecSpeed:
    """Time encoding with error feedback, and decoding; the fastest of three."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(numel, generator=generator).to(device).view(numel // 512, 512)
    memory, after, out = torch.zeros_like(gradient), torch.empty_like(gradient), torch.zeros_like(gradient)
    draw = Draw(seed=0, step=0, name="speed", rank=0)
    encoded, decoded = [], []
    for _ in range(3):
        began = _now(device)
        payload = compressor.encode_with_feedback(gradient, memory, after, draw)
        between = _now(device)
        add_to(out, compressor.decode(payload, gradient.shape, draw))
        encoded.append(between - began)
        decoded.append(_now(device) - between)
    return CodecSpeed(min(encoded) / numel, min(decoded) / numel)


def _exchange_s(channel: Channel, data: Tensor) -> float:
    splits = [data.numel() // channel.size] * channel.size
    output = torch.empty_like(data)
    began = _now(data.device)
    channel.all_to_all(output, data, splits, splits)
    return _now(data.device) - began


def _slowest(channel: Channel, seconds: float, device: torch.device) -> float:
    return float(channel.all_gather_same(torch.tensor([seconds], dtype=torch.float64, device=device)).max())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

"""How far apart the machines' weights are, for 4 bytes a probe instead of a copy of the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from thinwire.comm.gossip.graphs.shared_draw import Purpose, raw
from thinwire.comm.gossip.message import Kind, Message
from thinwire.comm.gossip.port import Port
from thinwire.comm.wire import PayloadError

_CHUNK = 1 << 16  # elements whose signs are in memory at once; a multiple of 64
_KEPT = 64  # measurements that wait for a machine's probe


@dataclass(frozen=True)
class Measured:
    """A consensus distance.

    Args:
        number: of the measurement.
        squared: estimate of Xi^2 = 1/n sum_i ||x_i - mean x||^2.
        machines: how many took part.
        spread: relative standard deviation of `squared` where the machines differ in many directions; worst, where they
            all differ along one.
    """

    number: int
    squared: float
    machines: int
    spread: float
    worst: float


class Probes:
    """Estimates Xi^2 without waiting for anybody.

    Every machine sends <r_k, x_i>, k = 1..count, to the lowest machine that is alive. r_k has elements +1 and -1 from a
    seed that all share, so E <r_k, v>^2 = ||v||^2 and

        1/count sum_k 1/n sum_i (<r_k, x_i> - mean_j <r_k, x_j>)^2

    is unbiased for Xi^2. Its relative standard deviation is sqrt(2 / (count (n - 1))) where the disagreement is spread
    over many directions, and sqrt(2 / count) where it has only one. Products are summed in fp64 and sent in fp32, so
    distances below 1e-7 of the weights' length are not seen.

    Args:
        count: probes; 8 to 32 are 32 to 128 bytes.
        seed: the same on all machines, 0..2^64-1.
    Attributes: newest, the last measurement; of the machine that gathers them, None on others.
    """

    def __init__(self, port: Port, *, count: int, seed: int) -> None:
        self._port = port
        self._count = count
        self._seed = seed
        self._found: dict[int, dict[int, Tensor]] = {}  # by number and machine
        self.newest: Measured | None = None

    def publish(self, number: int, value: Tensor) -> None:
        """Take part in a measurement with this machine's weights.

        Args: number: higher each time, 0..2^64-1.
        """
        projected = project(value, self._count, self._seed, number)
        leader = self._leader()
        if leader == self._port.rank:
            self._keep(number, leader, projected)
        else:
            self._port.send(leader, Message(Kind.PROBE, number, payload=projected.view(torch.uint8)))

    def collect(self) -> None:
        """Take what has arrived; `newest` becomes the last measurement that all machines alive took part in."""
        for rank in self._port.waiting(Kind.PROBE):
            while self._port.peek(rank, Kind.PROBE) is not None:
                message = self._port.take(rank, Kind.PROBE)
                self._keep(message.round, rank, decode(message.payload, self._count))
        if self._leader() != self._port.rank:
            return
        alive = set(range(self._port.size)) - self._port.lost()
        complete = [number for number, found in self._found.items() if alive <= found.keys()]
        if complete:
            self.newest = measure(max(complete), [self._found[max(complete)][rank] for rank in sorted(alive)])
            self._found = {number: found for number, found in self._found.items() if number > max(complete)}

    def sent_bytes(self) -> dict[int, int]:
        """Payload bytes of one publish(), by machine."""
        leader = self._leader()
        return {} if leader == self._port.rank else {leader: probe_bytes(self._count)}

    def metrics(self) -> dict[str, float]:
        """`consensus_distance`, Xi, and `consensus_spread`, its relative standard deviation, where it is gathered."""
        if self.newest is None:
            return {}
        # d sqrt(v) = dv / (2 sqrt(v))
        return {"consensus_distance": math.sqrt(self.newest.squared), "consensus_spread": self.newest.spread / 2}

    def _leader(self) -> int:
        return min(set(range(self._port.size)) - self._port.lost())

    def _keep(self, number: int, rank: int, projected: Tensor) -> None:
        if self.newest is None or number > self.newest.number:
            self._found.setdefault(number, {})[rank] = projected
        while len(self._found) > _KEPT:
            del self._found[min(self._found)]


def probe_bytes(count: int) -> int:
    """Payload of so many probes."""
    return 4 * count


def project(value: Tensor, count: int, seed: int, number: int) -> Tensor:
    """<r_k, value> for k = 1..count: fp32, on the CPU."""
    total = torch.zeros(count, dtype=torch.float64, device=value.device)
    key = raw(Purpose.PROBE, seed, number, 1).item()
    for place, chunk in enumerate(value.split(_CHUNK)):
        words = -(-chunk.numel() // 64)
        drawn = raw(Purpose.PROBE, key, 1 + place, count * words).astype("<u8").view(np.uint8)
        packed = torch.from_numpy(drawn).to(value.device).view(count, -1, 1)
        bits = (packed >> torch.arange(8, dtype=torch.uint8, device=value.device)) & 1
        signs = bits.view(count, -1)[:, : chunk.numel()].double().mul_(2.0).sub_(1.0)
        total += signs @ chunk.double()
    return total.float().cpu()


def measure(number: int, projected: list[Tensor]) -> Measured:
    """Xi^2 from the probes of all machines."""
    count, machines = len(projected[0]), len(projected)
    squared = torch.stack(projected).double().var(dim=0, correction=0).mean()
    spread = math.sqrt(2 / (count * max(machines - 1, 1)))
    return Measured(number, float(squared), machines, spread, math.sqrt(2 / count))


def decode(payload: Tensor, count: int) -> Tensor:
    """What publish() has sent.

    Raises:
        PayloadError: it is not so many finite numbers.
    """
    if len(payload) != probe_bytes(count):
        raise PayloadError(f"{count} probes take {probe_bytes(count)} bytes, not {len(payload)}")
    numbers = payload.clone().view(torch.float32)
    if not bool(numbers.isfinite().all()):
        raise PayloadError("a probe is not finite")
    return numbers

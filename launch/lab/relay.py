"""Delay and loss for kernels without netem: a process that carries every frame between the hosts' TAP devices.

    frame of host s --(tbf of s, in the kernel)--> [lost?] --(delay)--> queue of host d --(rate of d)--> host d

Sending is shaped by the kernel's token bucket on eth0, as without delay; the relay adds what comes after it.
The way from s to d takes the mean of the two hosts' delays, so `delay_s` when all are equal.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import select
import socket
import time
from collections import deque
from dataclasses import dataclass, field

from thinwire.launch.lab.network import queue_bytes

_FRAME_LIMIT = 65536
_FRAMES_PER_TURN = 64
# Frames that fall due within this time are handed over together: fewer wake-ups, and invisible beside a delay.
_TICK_S = 0.0002
_PRIORITY = -15


@dataclass
class Port:
    """One host's end of the relay."""

    tap_fd: int
    rate_bps: float | None
    delay_s: float
    cut: bool = False
    free_at: float = 0.0
    waiting: deque[tuple[float, bytes]] = field(default_factory=deque)


class Relay:
    """Carries frames until its control socket closes.

    ports: one per host, in host order; loss: probability that a frame is dropped;
    control: JSON messages {"host", "rate_bps", "delay_s", "cut"} that change a port.
    """

    def __init__(self, ports: list[Port], loss: float, control: socket.socket) -> None:
        self._ports = ports
        self._loss = loss
        self._control = control
        self._in_flight: list[tuple[float, int, int, bytes]] = []
        self._serial = 0
        self._random = random.Random(0)

    def run(self) -> None:
        """Serve, ahead of the ranks where this process may: a busy machine must not add to the delay."""
        try:
            os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
        except PermissionError:
            pass  # only root may; the delay is then as exact as the machine is idle
        taps = {port.tap_fd: index for index, port in enumerate(self._ports)}
        inputs = [self._control.fileno(), *taps]
        while True:
            readable, _, _ = select.select(inputs, [], [], self._seconds_to_next())
            now = time.monotonic()
            for fd in readable:
                if fd in taps:
                    self._take(taps[fd], now)
                elif not self._obey():
                    return
            self._arrive(now)
            for port in self._ports:
                if port.waiting:
                    _deliver(port, now)

    def _seconds_to_next(self) -> float | None:
        due = [port.waiting[0][0] for port in self._ports if port.waiting]
        if self._in_flight:
            due.append(self._in_flight[0][0])
        return max(_TICK_S, min(due) - time.monotonic()) if due else None

    def _take(self, source: int, now: float) -> None:
        """Put what `source` sends on its way."""
        ports, port, loss = self._ports, self._ports[source], self._loss
        for _ in range(_FRAMES_PER_TURN):
            try:
                frame = os.read(port.tap_fd, _FRAME_LIMIT)
            except BlockingIOError:
                return
            target = frame[5]  # the last byte of the destination's Ethernet address
            if target >= len(ports) or port.cut or (loss and self._random.random() < loss):
                continue
            self._serial += 1
            due = now + (port.delay_s + ports[target].delay_s) / 2
            heapq.heappush(self._in_flight, (due, self._serial, target, frame))

    def _arrive(self, now: float) -> None:
        """Move frames whose delay is over into their target's queue; a full queue drops."""
        in_flight = self._in_flight
        while in_flight and in_flight[0][0] <= now:
            due, _, target, frame = heapq.heappop(in_flight)
            port = self._ports[target]
            if port.cut:
                continue
            leaves = due
            if port.rate_bps is not None:
                start = max(due, port.free_at)
                if (start - due) * port.rate_bps > 8 * queue_bytes(port.rate_bps):
                    continue
                leaves = port.free_at = start + len(frame) * 8 / port.rate_bps
            port.waiting.append((leaves, frame))

    def _obey(self) -> bool:
        """Apply one message; False when the other side has gone."""
        message = self._control.recv(4096)
        if not message:
            return False
        change = json.loads(message)
        port = self._ports[change["host"]]
        port.rate_bps, port.delay_s, port.cut = change["rate_bps"], change["delay_s"], change["cut"]
        return True


def _deliver(port: Port, now: float) -> None:
    waiting = port.waiting
    while waiting and waiting[0][0] <= now:
        try:
            os.write(port.tap_fd, waiting.popleft()[1])
        except OSError:
            pass  # the host's own queue is full: the frame is lost, as on any network card

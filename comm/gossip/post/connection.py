"""One TCP connection after its greeting: frames out, frames in, without copying payloads."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from thinwire.comm.gossip.post.frame import HEADER_BYTES, Header, pack_header, parse_header
from thinwire.comm.wire import PayloadError


class Connection:
    """One thread sends and one receives; any may hang up.

    Args:
        sock: connected and greeted; owned from here on.
        limit_bytes: of the longest payload.
        tick_s: how often receive() says that nothing comes.
        silence_s: after which the system gives up on bytes that the other side does not acknowledge.
    """

    def __init__(self, sock: socket.socket, *, limit_bytes: int, tick_s: float, silence_s: float) -> None:
        self._sock = sock
        self._limit_bytes = limit_bytes
        self._sending = threading.Lock()
        self._open = True
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(1000 * silence_s)))
        if hasattr(socket, "TCP_KEEPIDLE"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(silence_s / 2)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(silence_s / 4)))
        # The system's timeout and not Python's: so that one call can wait for a whole payload, without the interpreter.
        whole_s = int(tick_s)
        tick = struct.pack("@ll", whole_s, max(1, int(1e6 * (tick_s - whole_s))))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)

    def send(self, header: Header, payload: Tensor) -> None:
        """Hand a frame to the system; blocks while the other side does not read. The checksum is filled in here.

        Raises:
            OSError: the connection is broken.
        """
        body = payload.numpy().data
        head = pack_header(replace(header, checksum=zlib.crc32(body)))
        with self._sending:
            if not self._open:
                raise ConnectionResetError("hung up")
            sent = self._sock.sendmsg([head, body])
            if sent < len(head):
                self._sock.sendall(head[sent:])
                sent = len(head)
            if sent < len(head) + len(body):
                self._sock.sendall(body[sent - len(head) :])

    def receive(self, heard: Callable[[bool], None]) -> tuple[Header, Tensor]:
        """The next frame, and its payload in memory of its own.

        Args: heard, called with True when bytes have come, with False after each tick in which none have.
        Raises:
            OSError: the connection is broken or was closed.
            PayloadError: what came is damaged or no frame.
        """
        head = bytearray(HEADER_BYTES)
        self._fill(memoryview(head), heard)
        header = parse_header(head, self._limit_bytes)
        payload = torch.empty(header.payload_bytes, dtype=torch.uint8)
        body = payload.numpy().data
        self._fill(body, heard)
        if zlib.crc32(body) != header.checksum:
            raise PayloadError(f"a message of {header.payload_bytes} bytes whose checksum is wrong")
        return header, payload

    def hang_up(self) -> None:
        """End it at once for both sides; whoever sends or receives on it gets an OSError."""
        self._open = False
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def end_sending(self) -> None:
        """Nothing more will be sent; what the other side still sends can be received."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Hang up and give the descriptor back; for the thread that receives, when it no longer does."""
        self.hang_up()
        with self._sending:
            self._sock.close()

    def _fill(self, view: memoryview, heard: Callable[[bool], None]) -> None:
        while view:
            try:
                count = self._sock.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                heard(False)
                continue
            if not count:
                raise ConnectionResetError("the connection was closed")
            heard(True)
            view = view[count:]

"""Messages between machines over TCP: contributions as their frame alone, everything else numbered and checked."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from thinwire.comm.address import split_address
from thinwire.comm.onebyte.membership import handshake, message_code
from thinwire.comm.onebyte.membership.core import Outgoing
from thinwire.comm.onebyte.membership.errors import MessageError
from thinwire.comm.onebyte.membership.frame import CHECK_BYTES, FRAME, HEADER, Frame, parse_frame
from thinwire.comm.onebyte.membership.handshake import TAG_BYTES, Greeting
from thinwire.comm.onebyte.membership.messages import Control

_KIND = struct.Struct("<H")
_LENGTH = struct.Struct("<I")
_NUMBER = struct.Struct("<Q")
_STRANGERS = 64
_UNSENT_BYTES = 1 << 25
_WAITING_MESSAGES = 32


@dataclass
class Traffic:
    """Bytes handed to TCP and received from it, by this machine. frame: of contributions alone."""

    sent_bytes: int = 0
    received_bytes: int = 0
    frame_bytes: int = 0
    frames: int = 0
    refused: int = 0


def packed_bytes(message: Control) -> int:
    """What a control message takes on a connection."""
    return _KIND.size + _LENGTH.size + len(message_code.encode(message)[1]) + TAG_BYTES


class _Connection:
    """A connection after its greeting."""

    def __init__(self, writer: asyncio.StreamWriter, address: str, key_out: bytes, key_in: bytes) -> None:
        self.writer, self.address, self.key_in = writer, address, key_in
        self._key_out = key_out
        self._sent = 0
        self.received = 0

    def pack(self, message: Outgoing) -> bytes:
        if isinstance(message, bytes):
            return message
        kind, body = message_code.encode(message)
        data = _KIND.pack(kind) + _LENGTH.pack(len(body)) + body
        self._sent += 1
        return data + handshake.tag(self._key_out, _NUMBER.pack(self._sent), data)


class Connections:
    """One connection to every machine that this one has to do with, made when it is needed.

    All methods but the constructor belong to the event loop's thread.

    Args:
        listener: bound socket; owned from here on.
        me: this machine's run and address.
        patience_s: for connecting and greeting, and for a peer to acknowledge bytes.
        retry_s: before an address that could not be reached is tried again.
        receive: called with (address of the sender, message); raises MessageError for what makes no sense.
        lost: called with the address to which no connection is left.
        manifest: what those get who ask for it.
    """

    def __init__(
        self,
        listener: socket.socket,
        me: Greeting,
        secret: bytes,
        *,
        patience_s: float,
        retry_s: float,
        receive: Callable[[str, Control | Frame], None],
        lost: Callable[[str], None],
        manifest: bytes,
    ) -> None:
        self.traffic = Traffic()
        self.problems: dict[str, str] = {}
        self._listener, self._me, self._secret = listener, me, secret
        self._patience_s, self._retry_s = patience_s, retry_s
        self._receive, self._lost, self._manifest = receive, lost, manifest
        self._open: dict[str, _Connection] = {}
        self._advertised: dict[str, str] = {}  # by the address under which a machine was reached
        self._waiting: dict[str, deque[Outgoing]] = {}
        self._retry_at: dict[str, float] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._strangers = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Accept connections."""
        self._server = await asyncio.start_server(self._accept, sock=self._listener)

    async def close(self) -> None:
        """Send what is left to send, as far as that goes at once, and close everything."""
        assert self._server is not None
        self._server.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._drained(), self._patience_s)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()

    def send(self, address: str, message: Outgoing) -> None:
        """Send, or try to connect first. What cannot be sent is dropped: the protocol repeats what matters."""
        connection = self._open.get(self._advertised.get(address, address))
        if connection is not None:
            self._write(connection, message)
            return
        waiting = self._waiting.get(address)
        if waiting is None:
            if asyncio.get_running_loop().time() < self._retry_at.get(address, 0.0):
                return
            waiting = self._waiting[address] = deque(maxlen=_WAITING_MESSAGES)
            self._spawn(self._dial(address))
        waiting.append(message)

    def _write(self, connection: _Connection, message: Outgoing) -> None:
        transport = connection.writer.transport
        if transport.is_closing():
            return
        if transport.get_write_buffer_size() > _UNSENT_BYTES:
            transport.abort()  # it has stopped reading; once it goes on it connects again
            return
        data = connection.pack(message)
        self.traffic.sent_bytes += len(data)
        if isinstance(message, bytes):
            self.traffic.frames += 1
            self.traffic.frame_bytes += len(data)
        transport.write(data)

    async def _drained(self) -> None:
        for connection in list(self._open.values()):
            with contextlib.suppress(OSError):
                connection.writer.transport.set_write_buffer_limits(0)
                await connection.writer.drain()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dial(self, address: str) -> None:
        try:
            reader, writer = await asyncio.wait_for(asyncio.open_connection(*split_address(address)), self._patience_s)
        except (OSError, asyncio.TimeoutError, ValueError) as error:
            self._problem(address, f"cannot be reached: {error or 'no answer'}")
            return
        await self._serve(reader, writer, dialled=address)

    def _problem(self, address: str, what: str) -> None:
        self.problems[address] = what
        self._waiting.pop(address, None)
        self._retry_at[address] = asyncio.get_running_loop().time() + self._retry_s

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._strangers >= _STRANGERS:
            writer.transport.abort()
        else:
            self._spawn(self._serve(reader, writer, dialled=None))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, dialled: str | None) -> None:
        connection = None
        try:
            _set_options(writer, self._patience_s)
            self._strangers += dialled is None
            try:
                connection = await asyncio.wait_for(self._greet(reader, writer), self._patience_s)
            finally:
                self._strangers -= dialled is None
            if connection is None:
                return
            self._open[connection.address] = connection
            if dialled:
                self._advertised[dialled] = connection.address
            for address in {dialled or connection.address, connection.address}:
                self.problems.pop(address, None)
                for message in self._waiting.pop(address, ()):
                    self._write(connection, message)
            while True:
                await self._read(reader, connection)
        except MessageError as error:
            self.traffic.refused += 1
            self._problem(connection.address if connection else dialled or "", f"said something wrong: {error}")
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
            if connection is None and dialled:
                self._problem(dialled, f"closed the connection without a greeting ({type(error).__name__})")
        finally:
            writer.close()
            if dialled:
                self._waiting.pop(dialled, None)
            if connection is not None and self._open.get(connection.address) is connection:
                del self._open[connection.address]
                self._lost(connection.address)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Connection | None:
        mine = self._me._replace(nonce=secrets.token_bytes(handshake.NONCE_BYTES))
        writer.write(handshake.pack_greeting(mine, self._secret))
        head = await reader.readexactly(handshake.HEAD.size)
        theirs = handshake.parse_greeting(head + await reader.readexactly(handshake.rest_bytes(head)), self._secret)
        key_out = handshake.session_key(self._secret, mine, theirs)
        key_in = handshake.session_key(self._secret, theirs, mine)
        writer.write(handshake.tag(key_out, b"confirm"))
        if await reader.readexactly(TAG_BYTES) != handshake.tag(key_in, b"confirm"):
            raise MessageError("a greeting of another connection, repeated")
        if theirs.purpose == handshake.FOR_MANIFEST:
            data = _LENGTH.pack(len(self._manifest)) + self._manifest
            writer.write(data + handshake.tag(key_out, data))
            await writer.drain()
            return None
        if theirs.run != mine.run:
            raise MessageError(
                f"it is in run {theirs.run.hex()}, this machine in {mine.run.hex()}: their base weights, parameters or "
                "settings differ"
            )
        if theirs.address == mine.address:
            raise MessageError(f"it is this machine itself, or one that also advertises {mine.address}")
        return _Connection(writer, theirs.address, key_out, key_in)

    async def _read(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        first = await reader.readexactly(_KIND.size)
        kind = _KIND.unpack(first)[0]
        message: Control | Frame
        if kind == FRAME:
            head = first + await reader.readexactly(HEADER.size - len(first))
            data = head + await reader.readexactly(HEADER.unpack(head)[-1] + CHECK_BYTES)
            message = parse_frame(data, self._me.run)
        else:
            limit = message_code.limit_bytes(kind)
            head = first + await reader.readexactly(_LENGTH.size)
            length = _LENGTH.unpack_from(head, _KIND.size)[0]
            if length > limit:
                raise MessageError(f"a message of kind {kind} that announces {length} bytes; at most {limit}")
            data = head + await reader.readexactly(length + TAG_BYTES)
            connection.received += 1
            expected = handshake.tag(connection.key_in, _NUMBER.pack(connection.received), data[:-TAG_BYTES])
            if data[-TAG_BYTES:] != expected:
                raise MessageError(f"a message of kind {kind} whose check bytes are wrong")
            message = message_code.decode(kind, data[len(head) : -TAG_BYTES])
        self.traffic.received_bytes += len(data)
        self._receive(connection.address, message)


def _set_options(writer: asyncio.StreamWriter, patience_s: float) -> None:
    """Give up on a peer that acknowledges nothing, so that a new connection can be tried."""
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, max(1, int(2000 * patience_s)))
    if hasattr(socket, "TCP_KEEPIDLE"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(2 * patience_s)))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(patience_s)))

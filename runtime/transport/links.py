"""Links for Trio: one interface over Unix sockets, TCP and WebSocket.

``send`` never waits: what the socket does not take at once is queued, and the link's writer task sends it when it
can. Control frames overtake the rest of a large transfer: bulk goes in chunks, and a chunk goes only when no control
frame waits.
"""

import errno
import socket
import ssl
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio

from trio_ray.runtime.transport import addresses
from trio_ray.runtime.transport.frames import (
    CHUNK_BYTES,
    MAX_CONTROL_BYTES,
    FrameReader,
    ProtocolError,
    Window,
    control_frame,
    control_header,
    data_header,
)
from trio_ray.runtime.transport.handshake import AuthenticationError, Dialler, Hello, Listener, Welcome, last_word

HANDSHAKE_LIMIT_S = 10.0
MAX_IOVECS = 64
Frame = memoryview | tuple[int, int]
"""A control body (valid until the next receive), or ``(transfer, size)`` of data that reached its window."""


class LinkClosed(Exception):
    """The link is closed; the text says why, and is empty for a clean end."""


class Bulk:
    """A transfer on its way out."""

    __slots__ = ("data", "done", "position", "transfer")

    def __init__(self, transfer: int, data: memoryview, done: Callable[[], None]) -> None:
        self.transfer = transfer
        self.data = data
        self.position = 0
        self.done = done


class Link(ABC):
    """One connection. Its owner runs ``write_forever`` in a task and calls ``receive`` from another."""

    def __init__(self) -> None:
        self.window: Window = lambda transfer, position, size: None
        """Where data frames go; set by the owner after the handshake."""
        self._control: deque[bytes | memoryview] = deque()
        self._bulk: deque[Bulk] = deque()
        self._wake = trio.Event()
        self.queued = 0
        """Bytes of control frames that wait to be sent."""
        self.closed = False

    def send(self, body: bytes) -> None:
        """Queue (or send at once) a control frame. Nothing happens on a closed link: its reader learns of the end."""
        if self.closed:
            return
        frame = control_frame(body) if len(body) < CHUNK_BYTES else control_header(len(body))
        self._control.append(frame)
        if frame is not body and len(body) >= CHUNK_BYTES:
            self._control.append(body)
        self.queued += len(body)
        self._kick()

    def send_bulk(self, transfer: int, data: memoryview, done: Callable[[], None]) -> None:
        """Queue raw bytes; ``done`` is called when the last has left, or when the link is closed before."""
        if self.closed:
            done()
            return
        self._bulk.append(Bulk(transfer, data, done))
        self._kick()

    def _kick(self) -> None:
        self._wake.set()

    def _window(self, transfer: int, position: int, size: int) -> memoryview | None:
        return self.window(transfer, position, size)

    def _abandon(self) -> None:
        self.closed = True
        self._wake.set()
        bulk, self._bulk = self._bulk, deque()
        for item in bulk:
            item.done()

    @abstractmethod
    async def receive(self) -> list[Frame]:
        """What arrived next, never empty; one frame at a time during the handshake. Raises LinkClosed, ProtocolError."""

    @abstractmethod
    async def write_forever(self) -> None:
        """Send what is queued, until the link is closed."""

    @abstractmethod
    def close(self) -> None:
        """Close the link now; ``receive`` raises LinkClosed."""

    @abstractmethod
    def lift_limit(self) -> None:
        """The peer has authenticated: take frames of full size, and data."""


class SocketLink(Link):
    """Over a Unix or TCP socket. What can be sent without waiting is sent by ``send`` itself."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._reader = FrameReader(self._window)
        self._blocked = False
        """The socket did not take all: only the writer task sends until it has caught up."""
        self._chunk: deque[memoryview] = deque()
        """The rest of the data chunk under way."""

    def lift_limit(self) -> None:
        self._reader.limit = MAX_CONTROL_BYTES

    def _kick(self) -> None:
        if not self._blocked:
            self._blocked = not self._send_some()
            if self._blocked:
                self._wake.set()

    def _send_some(self) -> bool:
        """Send until all is sent (True) or the socket is full."""
        control = self._control
        while True:
            if self._chunk and not self._send_from(self._chunk):
                return False
            if control:
                before = sum(map(len, control))
                sent_all = self._send_from(control)
                self.queued -= before - sum(map(len, control))
                if not sent_all:
                    return False
            elif self._bulk:
                self._next_chunk()
            elif not self._chunk:
                self.queued = 0
                return True

    def _next_chunk(self) -> None:
        bulk = self._bulk[0]
        data = bulk.data[bulk.position : bulk.position + CHUNK_BYTES]
        self._chunk.append(memoryview(data_header(bulk.transfer, bulk.position, len(data))))
        self._chunk.append(data)
        bulk.position += len(data)
        if bulk.position >= len(bulk.data):
            self._bulk.popleft()
            self._finish_bulk(bulk)
        elif len(self._bulk) > 1:
            self._bulk.rotate(-1)

    def _finish_bulk(self, bulk: Bulk) -> None:
        # The kernel has not taken the last chunk yet; its memoryview keeps the arena mapped, and the range may be
        # reused only when the chunk is gone: tell then.
        self._chunk_done = bulk.done

    _chunk_done: Callable[[], None] | None = None

    def _send_from(self, pieces: "deque[Any]") -> bool:
        while pieces:
            batch = [piece for piece, _ in zip(pieces, range(MAX_IOVECS), strict=False)]
            try:
                count = self._socket.sendmsg(batch)
            except (BlockingIOError, InterruptedError):
                return False
            except OSError:
                self._abandon()  # the reader learns why
                pieces.clear()
                return True
            while count:
                first = pieces[0]
                if len(first) <= count:
                    count -= len(first)
                    pieces.popleft()
                else:
                    pieces[0] = memoryview(first)[count:]
                    count = 0
        if pieces is self._chunk and self._chunk_done is not None:
            done, self._chunk_done = self._chunk_done, None
            done()
        return True

    async def write_forever(self) -> None:
        while not self.closed:
            if not self._blocked:
                await self._wake.wait()
                self._wake = trio.Event()
                continue
            try:
                await trio.lowlevel.wait_writable(self._socket)
            except (trio.ClosedResourceError, OSError):
                return
            self._blocked = not self._send_some()

    async def receive(self) -> list[Frame]:
        while True:
            try:
                count = self._socket.recv_into(self._reader.buffer())
            except (BlockingIOError, InterruptedError):
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                except trio.ClosedResourceError:
                    raise LinkClosed("") from None
                continue
            except OSError as error:
                raise LinkClosed("" if self.closed or error.errno == errno.EBADF else str(error.strerror)) from None
            if not count:
                raise LinkClosed("")
            frames = self._reader.received(count)
            if frames:
                return frames

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        self._abandon()
        if self._chunk_done is not None:
            done, self._chunk_done = self._chunk_done, None
            done()


class WebSocketLink(Link):
    """Over a WebSocket, for drivers that sit behind an HTTP proxy: a message carries a frame."""

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection
        self._reader = FrameReader(self._window)
        self._rest = memoryview(b"")
        """Of the message under way."""
        self._shaking = True

    def lift_limit(self) -> None:
        self._reader.limit = MAX_CONTROL_BYTES
        self._shaking = False

    async def receive(self) -> list[Frame]:
        frames: list[Frame] = []
        while not frames:
            if not len(self._rest):
                self._rest = await self._message()
            while len(self._rest) and not (frames and self._shaking):
                buffer = self._reader.buffer()
                count = min(len(buffer), len(self._rest))
                buffer[:count] = self._rest[:count]
                self._rest = self._rest[count:]
                for frame in self._reader.received(count):
                    # A body is valid until the next ``buffer``: copy those that more of this message follows.
                    copy = len(self._rest) and isinstance(frame, memoryview)
                    frames.append(memoryview(bytes(frame)) if copy else frame)
        return frames

    async def _message(self) -> memoryview:
        from trio_websocket import ConnectionClosed

        try:
            message = await self._connection.get_message()
        except ConnectionClosed:
            raise LinkClosed("") from None
        if not isinstance(message, bytes):
            raise ProtocolError("a text message on a link that carries binary frames")
        return memoryview(message)

    async def write_forever(self) -> None:
        from trio_websocket import ConnectionClosed

        try:
            while not self.closed:
                if self._control:
                    pieces = list(self._control)
                    self._control.clear()
                    self.queued = 0
                    await self._connection.send_message(b"".join(pieces))
                elif self._bulk:
                    bulk = self._bulk[0]
                    data = bulk.data[bulk.position : bulk.position + CHUNK_BYTES]
                    header = data_header(bulk.transfer, bulk.position, len(data))
                    await self._connection.send_message(header + bytes(data))
                    bulk.position += len(data)
                    if bulk.position >= len(bulk.data) and self._bulk and self._bulk[0] is bulk:
                        self._bulk.popleft()
                        bulk.done()
                else:
                    await self._wake.wait()
                    self._wake = trio.Event()
        except ConnectionClosed:
            return

    def close(self) -> None:
        self._abandon()
        trio.lowlevel.spawn_system_task(self._say_goodbye)

    async def _say_goodbye(self) -> None:
        with trio.move_on_after(1):
            await self._connection.aclose()


async def shake_hands(link: Link, dialler: Dialler) -> Welcome:
    """The dialling side of the handshake, on a link whose writer runs. Raises as ``dial``."""
    link.send(dialler.first)
    try:
        with trio.fail_after(HANDSHAKE_LIMIT_S):
            while dialler.welcome is None:
                for frame in await link.receive():
                    answer = dialler.received(frame)
                    if answer is not None:
                        link.send(answer)
    except (AuthenticationError, ProtocolError) as error:
        link.send(last_word(error))
        raise
    except trio.TooSlowError:
        raise ConnectionError("the peer did not answer the handshake; is it a trio-ray node?") from None
    except LinkClosed as error:
        raise ConnectionError(f"the peer closed the connection during the handshake {error}".rstrip()) from None
    link.lift_limit()
    return dialler.welcome


async def receive_hello(link: Link, listener: Listener) -> Hello:
    """The listening side of the handshake, up to the point where ``listener.accept`` is to be sent.

    Raises AuthenticationError, ProtocolError, LinkClosed or trio.TooSlowError; the peer was told.
    """
    try:
        with trio.fail_after(HANDSHAKE_LIMIT_S):
            while listener.hello is None:
                for frame in await link.receive():
                    answer = listener.received(frame)
                    if answer is not None:
                        link.send(answer)
    except (AuthenticationError, ProtocolError) as error:
        link.send(last_word(error))
        raise
    link.lift_limit()
    return listener.hello


@asynccontextmanager
async def dial(address: str, secret: bytes, hello: Hello) -> AsyncIterator[tuple[Link, Welcome]]:
    """An authenticated link to a node, whose writer runs until the block ends.

    Raises ConnectionError with a sentence, AuthenticationError, ProtocolError, or ValueError for what is no address.
    What the block itself raises comes in an ``ExceptionGroup``, as from any nursery.
    """
    where = addresses.parse(address)
    failure: Exception | None = None
    async with trio.open_nursery() as nursery:
        try:
            link, welcome = await _dial(where, secret, hello, nursery)
        except (ConnectionError, AuthenticationError, ProtocolError) as error:
            failure = error  # raised below: a nursery would wrap it in a group
            nursery.cancel_scope.cancel()
        else:
            try:
                yield link, welcome
            finally:
                link.close()
                nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


async def _dial(
    where: addresses.Endpoint, secret: bytes, hello: Hello, nursery: trio.Nursery
) -> tuple[Link, Welcome]:
    try:
        link = await _open(where, nursery)
    except OSError as error:
        raise ConnectionError(
            f"no cluster answers at {where} ({error}); is it up? `trio-ray status` shows clusters of this machine"
        ) from None
    nursery.start_soon(link.write_forever)
    try:
        return link, await shake_hands(link, Dialler(secret, hello))
    except BaseException:
        link.close()
        raise


async def _open(where: addresses.Endpoint, nursery: trio.Nursery) -> Link:
    if where.scheme in ("ws", "wss"):
        from trio_websocket import HandshakeError, connect_websocket_url

        context = ssl.create_default_context() if where.scheme == "wss" else None
        try:
            connection = await connect_websocket_url(
                nursery, str(where), ssl_context=context, max_message_size=MAX_CONTROL_BYTES + CHUNK_BYTES
            )
        except HandshakeError as error:
            raise OSError(f"no WebSocket there: {type(error).__name__}") from None
        return WebSocketLink(connection)
    if where.scheme == "unix":
        unix = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_STREAM)
        try:
            await unix.connect(where.host)
        except BaseException:
            unix.close()
            raise
        return SocketLink(socket.socket(fileno=unix.detach()))
    stream = await trio.open_tcp_stream(where.host, where.port)
    return SocketLink(socket.socket(fileno=stream.socket.detach()))

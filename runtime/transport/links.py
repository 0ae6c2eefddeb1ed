"""Links for Trio: one interface over Unix sockets, TCP and WebSocket.

``send`` never waits: what the socket does not take at once is queued, and the link's writer task sends it when it
can. Control frames overtake the rest of a large transfer: bulk goes in chunks, and a chunk goes only when no control
frame waits.
"""

import socket
import ssl
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any, NoReturn

import trio

from trio_ray.runtime.transport import addresses
from trio_ray.runtime.transport.eager import EagerReads
from trio_ray.runtime.transport.frames import (
    CHUNK_BYTES,
    HEADER_BYTES,
    MAX_CONTROL_BYTES,
    MAX_HANDSHAKE_BYTES,
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
JOIN_BYTES = 64 << 10
"""Up to this size a body is copied behind its header rather than sent as a piece of its own."""
MAX_QUEUED_BYTES = 2 << 30
"""More than this is not kept for a peer that does not read."""
MAX_MESSAGE_BYTES = 2 * CHUNK_BYTES
"""Of a WebSocket message; frames that are longer span several."""
GOODBYE_S = 0.2
"""How long the end of a WebSocket may take."""
MAX_IN_A_ROW = 8
"""Reads without a pause for other tasks."""
TURN_S = 0.001
"""How long to read, where it is done between two rounds of Trio's loop, before other links are looked at."""
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
        """Where data frames go; set by the owner."""
        self._reader = FrameReader(self._window)
        self._control: deque[bytes | memoryview] = deque()
        self._bulk: deque[Bulk] = deque()
        self._wake = trio.Event()
        self._queued = 0
        """Bytes of control frames that wait to be sent."""
        self.closed = False
        self.failure = ""
        """Why this side closed the link, if it was the peer's fault."""

    def send(self, body: bytes) -> None:
        """Queue (or send at once) a control frame. Nothing happens on a closed link: its reader learns of the end.

        A peer that does not read what it is sent loses the link when ``MAX_QUEUED_BYTES`` wait for it. Raises
        ProtocolError for a body that is longer than a frame may be.
        """
        if self.closed:
            return
        size = len(body)
        if size < JOIN_BYTES:
            self._control.append(control_frame(body))
        else:
            self._control.append(control_header(size))
            self._control.append(body)
        self._queued += HEADER_BYTES + size
        self._kick()
        if self._queued > MAX_QUEUED_BYTES and not self.closed:
            self.failure = f"it does not read what it is sent: {self._queued:,} bytes wait for it"
            self.close()

    def send_bulk(self, transfer: int, data: memoryview, done: Callable[[], None]) -> None:
        """Queue raw bytes; ``done`` is called when the last has left, or when the link is closed before."""
        if self.closed:
            done()
            return
        self._bulk.append(Bulk(transfer, data, done))
        self._kick()

    def forget(self, transfer: int) -> None:
        """The window of an incoming transfer is closed; nothing more is written where it was."""
        self._reader.forget(transfer)

    def _kick(self) -> None:
        self._wake.set()

    @property
    def blocked(self) -> bool:
        """Whether something waits for the writer task."""
        return True

    def _window(self, transfer: int, position: int, size: int) -> memoryview | None:
        return self.window(transfer, position, size)

    def _abandon(self) -> None:
        self.closed = True
        self._control.clear()
        self._queued = 0
        self._wake.set()
        bulk, self._bulk = self._bulk, deque()
        for item in bulk:
            item.done()

    @abstractmethod
    async def receive(self) -> list[Frame]:
        """What arrived next, never empty; one frame at a time in the handshake. Raises LinkClosed, ProtocolError."""

    async def read_forever(self, arrived: Callable[[list[Frame]], None], eager: EagerReads) -> NoReturn:
        """Hand over what arrives, as it arrives. Raises LinkClosed, ProtocolError, and what ``arrived`` raises."""
        while True:
            arrived(await self.receive())

    @abstractmethod
    async def write_forever(self) -> None:
        """Send what is queued, until the link is closed."""

    @abstractmethod
    def close(self) -> None:
        """Close the link now; ``receive`` raises LinkClosed."""

    @abstractmethod
    def lift_limit(self) -> None:
        """The peer has authenticated: take frames of full size, and data."""


def _nothing() -> None:
    pass


class SocketLink(Link):
    """Over a Unix or TCP socket. What can be sent without waiting is sent by ``send`` itself."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock
        self._blocked = False
        """The socket did not take all: only the writer task sends until it has caught up."""
        self._chunk: deque[bytes | memoryview] = deque()
        """The rest of the data chunk under way."""
        self._ending: Bulk | None = None
        """The transfer whose last chunk is under way: only when the kernel has it may its range be reused."""
        self._drained = True
        """The last read took all there was."""
        self._in_a_row = 0
        self._end_reading = _nothing

    def lift_limit(self) -> None:
        self._reader.limit = MAX_CONTROL_BYTES

    @property
    def blocked(self) -> bool:
        return self._blocked or self.closed

    def _kick(self) -> None:
        if not self._blocked:
            self._blocked = not self._send_some()
            if self._blocked:
                self._wake.set()

    def _send_some(self) -> bool:
        """Send until all is sent (True) or the socket is full."""
        while True:
            if self._chunk:
                if not self._send_from(self._chunk):
                    return False
                if self._ending is not None:
                    ended, self._ending = self._ending, None
                    ended.done()
            if self._control:
                if not self._send_from(self._control):
                    return False
                self._queued = 0
            elif self._bulk:
                self._next_chunk()
            else:
                return True

    def _next_chunk(self) -> None:
        bulk = self._bulk[0]
        data = bulk.data[bulk.position : bulk.position + CHUNK_BYTES]
        self._chunk.append(data_header(bulk.transfer, bulk.position, len(data)))
        self._chunk.append(data)
        bulk.position += len(data)
        if bulk.position >= len(bulk.data):
            self._ending = self._bulk.popleft()
        elif len(self._bulk) > 1:
            self._bulk.rotate(-1)

    def _send_from(self, pieces: deque[bytes | memoryview]) -> bool:
        """Send pieces; False when the socket is full. A broken socket swallows them: the reader learns why."""
        try:
            while pieces:
                if len(pieces) == 1:
                    count = self._socket.send(pieces[0])
                else:
                    count = self._socket.sendmsg(list(islice(pieces, MAX_IOVECS)))
                if pieces is self._control:
                    self._queued -= count
                while count:
                    first = pieces[0]
                    if len(first) <= count:
                        count -= len(first)
                        pieces.popleft()
                    else:
                        pieces[0] = memoryview(first)[count:]
                        count = 0
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            pieces.clear()
            self._abandon()
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
            if self._drained:
                self._in_a_row = 0
                try:
                    await trio.lowlevel.wait_readable(self._socket)
                except (trio.ClosedResourceError, OSError):
                    raise LinkClosed(self.failure) from None
            elif self._in_a_row > MAX_IN_A_ROW:  # a peer that sends without end is not to starve the others
                self._in_a_row = 0
                await trio.lowlevel.checkpoint()
            self._in_a_row += 1
            frames = self._read()
            if frames:
                return frames

    async def read_forever(self, arrived: Callable[[list[Frame]], None], eager: EagerReads) -> NoReturn:
        ended = trio.Event()
        failure: list[Exception] = []

        def read() -> None:
            try:
                until = 0.0
                while True:
                    frames = self._read()
                    if frames:
                        arrived(frames)
                    if self._drained:
                        break
                    now = time.monotonic()
                    if not until:
                        until = now + TURN_S
                    elif now >= until:
                        break
            except Exception as error:  # the end of the link, or a fault: for the task that owns it
                failure.append(error)
                end()

        def end() -> None:
            eager.remove(fd)
            ended.set()

        if self._socket.fileno() < 0:
            raise LinkClosed(self.failure)
        fd = self._socket.fileno()
        eager.add(fd, read)
        self._end_reading = end
        try:
            await ended.wait()
        finally:
            end()
        raise failure[0] if failure else LinkClosed(self.failure)

    def _read(self) -> list[Frame]:
        """The frames that have arrived, perhaps none. Raises LinkClosed at the end of the stream, ProtocolError."""
        buffer = self._reader.buffer()
        try:
            count = self._socket.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            self._drained = True
            return []
        except ConnectionResetError:  # the peer ended with something of ours unread
            raise LinkClosed(self.failure) from None
        except OSError as error:
            raise LinkClosed(self.failure if self.closed else str(error.strerror)) from None
        if not count:
            raise LinkClosed("")
        self._drained = count < len(buffer)
        return self._reader.received(count)

    def stop_reading(self) -> None:
        """What has arrived is still received, then the link counts as closed (for a peer whose process has ended)."""
        try:
            self._socket.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # it is closed already

    def close(self) -> None:
        if self._socket.fileno() >= 0:
            self._end_reading()
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
        self._abandon()
        if self._ending is not None:
            ended, self._ending = self._ending, None
            ended.done()


class WebSocketLink(Link):
    """Over a WebSocket, for drivers that sit behind an HTTP proxy: its messages are pieces of the stream of frames."""

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection
        self._rest = memoryview(b"")
        """Of the message under way."""
        self._shaking = True
        self._writing = trio.CancelScope()
        self._last_words = b""

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
            with self._writing:
                await self._write()
        except ConnectionClosed:
            pass
        finally:
            self._abandon()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + GOODBYE_S):
                try:
                    if self._last_words:
                        await self._connection.send_message(self._last_words)
                    await self._connection.aclose()
                except ConnectionClosed:
                    pass

    async def _write(self) -> None:
        while True:
            if self._control:
                pieces = list(self._control)
                self._control.clear()
                self._queued = 0
                stream = b"".join(pieces)
                for begin in range(0, len(stream), CHUNK_BYTES):
                    await self._connection.send_message(stream[begin : begin + CHUNK_BYTES])
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

    def close(self) -> None:
        if not self.closed:
            if self._queued < MAX_HANDSHAKE_BYTES:  # a refusal, say
                self._last_words = b"".join(self._control)
            self._abandon()
            self._writing.cancel()


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
async def dial(
    address: str, secret: bytes, hello: Hello, window: Window | None = None
) -> AsyncIterator[tuple[Link, Welcome]]:
    """An authenticated link to a node, until the block ends. Data frames go where ``window`` says.

    Raises ConnectionError with a sentence, AuthenticationError, ProtocolError, or ValueError for what is no address.
    What the block itself raises comes in an ``ExceptionGroup``, as from any nursery.
    """
    where = addresses.parse(address)
    failure: Exception | None = None
    async with trio.open_nursery() as readers, trio.open_nursery() as writers:
        try:
            link, welcome = await _dial(where, secret, hello, window, readers, writers)
        except (ConnectionError, AuthenticationError, ProtocolError) as error:
            failure = error  # raised below: a nursery would wrap it in a group
        else:
            try:
                yield link, welcome
            finally:
                link.close()
        # A writer says goodbye first, which takes its reader.
        writers.cancel_scope.cancel()
        readers.cancel_scope.deadline = trio.current_time() + GOODBYE_S
    if failure is not None:
        raise failure


async def open_link(
    address: str, secret: bytes, hello: Hello, window: Window, nursery: trio.Nursery
) -> tuple[Link, Welcome]:
    """An authenticated link to a node, whose tasks run in ``nursery`` until it is closed. Raises as ``dial``."""
    return await _dial(addresses.parse(address), secret, hello, window, nursery, nursery)


async def _dial(
    where: addresses.Endpoint, secret: bytes, hello: Hello, window: Window | None, readers: trio.Nursery,
    writers: trio.Nursery,
) -> tuple[Link, Welcome]:  # fmt: skip
    try:
        link = await _open(where, readers)
    except OSError as error:
        raise ConnectionError(
            f"no cluster answers at {where} ({error}); is it up? `trio-ray status` shows clusters of this machine"
        ) from None
    if window is not None:
        link.window = window
    writers.start_soon(link.write_forever)
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
                nursery, str(where), ssl_context=context, max_message_size=MAX_MESSAGE_BYTES
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

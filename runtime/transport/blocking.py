"""A link for plain threads: a blocking socket, used directly by the thread that needs it.

One hop costs about 35 µs when a thread reads the socket itself, and half as much again when another thread has to wake
it (DESIGN section 6); so nothing stands between the caller and the socket here.
"""

import select
import socket
from typing import Any

import msgspec

from trio_ray.runtime.core.messages import AnyMessage
from trio_ray.runtime.transport import addresses
from trio_ray.runtime.transport.frames import (
    MAX_CONTROL_BYTES,
    FrameReader,
    ProtocolError,
    Window,
    control_frame,
    control_header,
    data_header,
)
from trio_ray.runtime.transport.handshake import AuthenticationError, Dialler, Hello, Welcome, last_word

_encode = msgspec.msgpack.Encoder().encode
_decoder: msgspec.msgpack.Decoder[list[AnyMessage]] | None = None
JOIN_BYTES = 16 << 10
"""Up to this size a frame is copied behind its header rather than sent in two pieces."""
CONNECT_LIMIT_S = 10.0


def message_decoder() -> "msgspec.msgpack.Decoder[list[AnyMessage]]":
    """The decoder of what processes and nodes say to each other (made once: it takes milliseconds)."""
    global _decoder
    if _decoder is None:
        _decoder = msgspec.msgpack.Decoder(list[AnyMessage])
    return _decoder


def _no_window(transfer: int, position: int, size: int) -> memoryview | None:
    return None


class BlockingLink:
    """A Unix or TCP connection to a node, after the handshake.

    ``send`` and ``receive`` may each be used by one thread at a time, and both at once.
    """

    def __init__(self, sock: socket.socket, window: Window = _no_window) -> None:
        self._socket = sock
        self._reader = FrameReader(window)
        self._decode = message_decoder().decode
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self.welcome: Welcome

    @classmethod
    def connect(cls, address: str, secret: bytes, hello: Hello, window: Window = _no_window) -> "BlockingLink":
        """Dial a node. Raises ConnectionError with a sentence, AuthenticationError, or ValueError for no address."""
        where = addresses.parse(address)
        if where.scheme not in ("unix", "tcp"):
            raise ValueError(f"{address!r}: a plain thread connects over unix: or tcp://; use trio_ray.connect for ws://")
        try:
            if where.scheme == "unix":
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                sock.settimeout(CONNECT_LIMIT_S)
                sock.connect(where.host)
            else:
                sock = socket.create_connection((where.host, where.port), CONNECT_LIMIT_S)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise ConnectionError(
                f"no cluster answers at {where} ({error.strerror or error}); is it up? "
                "`trio-ray status` shows clusters of this machine, `trio-ray up` starts one"
            ) from None
        link = cls(sock, window)
        try:
            link._shake_hands(Dialler(secret, hello))
        except BaseException:
            link.close()
            raise
        sock.settimeout(None)
        return link

    def _shake_hands(self, dialler: Dialler) -> None:
        self._socket.sendall(control_frame(dialler.first))
        try:
            while dialler.welcome is None:
                for body in self._frames():
                    answer = dialler.received(body)
                    if answer is not None:
                        self._socket.sendall(control_frame(answer))
        except (AuthenticationError, ProtocolError) as error:
            try:
                self._socket.sendall(control_frame(last_word(error)))
            except OSError:
                pass  # the peer is gone; what it said stands
            raise
        except TimeoutError:
            raise ConnectionError("the peer did not answer the handshake; is it a trio-ray node?") from None
        except OSError as error:
            why = error.strerror or error
            raise ConnectionError(f"the peer broke off the handshake ({why}); is it a trio-ray node?") from None
        self.welcome = dialler.welcome
        self._reader.limit = MAX_CONTROL_BYTES

    def _frames(self, flags: int = 0) -> list[Any]:
        count = self._socket.recv_into(self._reader.buffer(), 0, flags)
        if not count:
            raise ConnectionError("the node closed the connection")
        return self._reader.received(count)

    def fileno(self) -> int:
        """Of the socket, to wait on."""
        return self._socket.fileno()

    def send(self, messages: list[AnyMessage]) -> None:
        """Send a batch as one frame; blocks while the node does not take it. Raises ConnectionError."""
        body = _encode(messages)
        try:
            if len(body) <= JOIN_BYTES:
                self._socket.sendall(control_header(len(body)) + body)
            else:
                self._socket.sendall(control_header(len(body)))
                self._socket.sendall(body)
        except OSError as error:
            raise ConnectionError(f"the connection to the node is lost ({error.strerror or error})") from None

    def send_data(self, transfer: int, position: int, data: memoryview) -> None:
        """Send raw bytes of a transfer."""
        try:
            self._socket.sendall(data_header(transfer, position, len(data)))
            self._socket.sendall(data)
        except OSError as error:
            raise ConnectionError(f"the connection to the node is lost ({error.strerror or error})") from None

    def receive(self, timeout: float | None = None) -> tuple[list[AnyMessage], list[tuple[int, int]]]:
        """Messages, and data frames that reached their window as ``(transfer, size)``.

        Without ``timeout`` blocks until there is something; with one, both may be empty. Raises ConnectionError when
        the link is closed.
        """
        try:
            if timeout is None:
                frames = self._frames()
                while not frames:
                    frames = self._frames()
            else:
                if timeout and not self._poll.poll(timeout * 1000):
                    return [], []
                frames = self._frames(socket.MSG_DONTWAIT)
        except BlockingIOError:
            return [], []
        except OSError as error:
            raise ConnectionError(f"the connection to the node is lost ({error})") from None
        if len(frames) == 1 and type(frames[0]) is memoryview:
            return self._decode(frames[0]), []
        messages: list[AnyMessage] = []
        data: list[tuple[int, int]] = []
        for frame in frames:
            if type(frame) is memoryview:
                messages += self._decode(frame)
            else:
                data.append(frame)
        return messages, data

    def close(self) -> None:
        """Close the socket; a thread blocked in ``receive`` gets a ConnectionError."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._socket.close()

"""Frames on a byte stream, without the stream: what to send, where to receive into, what has arrived.

A frame is a length (4 bytes, little-endian), a kind (1 byte) and a body of that length. A *control* body is a
msgpack-encoded batch of messages. A *data* body is a transfer number, a position within the transfer (8 bytes each)
and raw bytes, which the receiver's socket writes straight to where they belong: into the node's arena.
"""

import struct
from collections.abc import Callable
from enum import IntEnum

MAX_CONTROL_BYTES = 1 << 30
"""No control frame is longer: a longer length is not a frame of ours, or not a sane one."""
BATCH_BYTES = 16 << 20
"""A sender splits a batch of messages that is longer where it can."""
MAX_HANDSHAKE_BYTES = 16 << 10
"""Until its peer has authenticated, a link takes no longer frame."""
CHUNK_BYTES = 1 << 20
"""Of user data in a data frame: large enough to be few, small enough for control frames to get in between."""

_HEADER = struct.Struct("<IB")
_DATA = struct.Struct("<IBQQ")
_PLACE = struct.Struct("<QQ")
HEADER_BYTES = _HEADER.size
BUFFER_BYTES = 256 << 10
KEPT_BYTES = 4 << 20
"""A buffer that grew beyond this for one long frame is given back after it."""


class FrameKind(IntEnum):
    """What a frame's body is."""

    CONTROL = 0
    DATA = 1


class ProtocolError(Exception):
    """The peer sent what is not a frame of this protocol; the link is closed."""


def control_header(size: int) -> bytes:
    """What precedes a control body of ``size`` bytes. Raises ProtocolError for one that no peer would take."""
    if size > MAX_CONTROL_BYTES:
        raise ProtocolError(
            f"a batch of messages of {size:,} bytes is larger than a frame may be ({MAX_CONTROL_BYTES:,} bytes); "
            "put large values into the object store and pass references"
        )
    return _HEADER.pack(size, FrameKind.CONTROL)


def control_frame(body: bytes) -> bytes:
    """A whole control frame."""
    return control_header(len(body)) + body


def data_header(transfer: int, position: int, size: int) -> bytes:
    """What precedes ``size`` raw bytes of a transfer."""
    return _DATA.pack(size + _PLACE.size, FrameKind.DATA, transfer, position)


Window = Callable[[int, int, int], memoryview | None]
"""``(transfer, position, size)`` to where the bytes go; None to drop them."""


class FrameReader:
    """Takes a stream apart. ``buffer`` is where to receive next; tell ``received`` how much arrived there."""

    def __init__(self, window: Window, limit: int = MAX_HANDSHAKE_BYTES) -> None:
        self.limit = limit
        """Length of the longest control body it takes."""
        self._window = window
        self._store = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._store)
        self._begin = 0
        self._end = 0
        self._needed = 0
        """Length of the incomplete frame at ``_begin``, once it is known."""
        self._target: memoryview | None = None
        self._dropping = 0
        """Bytes of a data frame still to come that nobody wants."""
        self._place: tuple[int, int] = (0, 0)
        """Transfer and size of the data frame under way."""

    def buffer(self) -> memoryview:
        """Where the next bytes of the stream go; never empty.

        During the handshake it has room for the frame under way only: what follows is for those who come after.
        """
        if self._target is not None:
            return self._target
        held = self._end - self._begin
        if not held:
            self._begin = self._end = 0
            if len(self._store) > KEPT_BYTES and not self._needed:
                self._store = bytearray(BUFFER_BYTES)
                self._view = memoryview(self._store)
        if self._begin + max(self._needed, held + 1) > len(self._store):
            self._make_room(held)
        if self.limit == MAX_HANDSHAKE_BYTES:
            return self._view[self._end : self._begin + (self._needed or HEADER_BYTES)]
        return self._view[self._end :]

    def _make_room(self, held: int) -> None:
        size = len(self._store)
        while size < max(self._needed, held + 1):
            size *= 2
        if size > len(self._store):
            grown = bytearray(size)
            grown[:held] = self._view[self._begin : self._end]
            self._store, self._view = grown, memoryview(grown)
        else:
            self._store[:held] = self._store[self._begin : self._end]
        self._begin, self._end = 0, held

    def received(self, count: int) -> list[memoryview | tuple[int, int]]:
        """``count`` bytes arrived in ``buffer``: the frames complete now.

        A control frame is its body, valid until the next call of ``buffer``; a data frame, whose bytes have gone to
        their window, is ``(transfer, size)``. Raises ProtocolError.
        """
        done: list[memoryview | tuple[int, int]] = []
        if self._target is not None:
            self._target = self._target[count:] if count < len(self._target) else None
            if self._target is None:
                done.append(self._place)
            return done
        self._end += count
        if self._dropping:
            gone = min(self._dropping, self._end - self._begin)
            self._begin += gone
            self._dropping -= gone
        while self._end - self._begin >= HEADER_BYTES:
            size, kind = _HEADER.unpack_from(self._store, self._begin)
            if kind == FrameKind.CONTROL:
                if size > self.limit:
                    raise ProtocolError(f"a frame of {size:,} bytes is longer than the {self.limit:,} allowed here")
                body = self._begin + HEADER_BYTES
                if self._end - body < size:
                    self._needed = HEADER_BYTES + size
                    break
                self._needed = 0
                done.append(self._view[body : body + size])
                self._begin = body + size
            elif kind == FrameKind.DATA and self.limit > MAX_HANDSHAKE_BYTES:
                if self._end - self._begin < _DATA.size:
                    break
                self._data(size, done)
                if self._target is not None or self._dropping:
                    break
            else:
                raise ProtocolError(f"a frame of the unknown kind {kind}; is the peer a trio-ray process?")
        return done

    def forget(self, transfer: int) -> None:
        """The window of this transfer is closed: what is still to come of a frame under way is dropped."""
        if self._target is not None and self._place[0] == transfer:
            self._dropping, self._target = len(self._target), None

    def _data(self, size: int, done: list[memoryview | tuple[int, int]]) -> None:
        if size < _PLACE.size:
            raise ProtocolError("a data frame without a place for its bytes")
        transfer, position = _PLACE.unpack_from(self._store, self._begin + HEADER_BYTES)
        self._begin += _DATA.size
        size -= _PLACE.size
        target = self._window(transfer, position, size)
        here = min(size, self._end - self._begin)
        if target is None:
            self._begin += here
            self._dropping = size - here
            return
        target[:here] = self._view[self._begin : self._begin + here]
        self._begin += here
        self._place = (transfer, size)
        if here == size:
            done.append(self._place)
        else:
            self._target = target[here:]

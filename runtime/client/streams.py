"""Values that arrive as data frames, at a process that shares no memory with its node."""

from trio_ray.runtime.core.client import ClientCore


class Streams:
    """Buffers by transfer. The transport asks for room while it takes a stream apart, possibly before the message that
    announces the value has been looked at; such bytes wait on their own."""

    def __init__(self, core: ClientCore) -> None:
        self._core = core
        self._buffers: dict[int, bytearray] = {}
        self._early: dict[int, list[tuple[int, bytearray]]] = {}
        """Pieces that came before their value was known, with their positions."""
        self._arrived: dict[int, int] = {}
        """Bytes."""

    def window(self, transfer: int, position: int, size: int) -> memoryview:
        """Where bytes of a transfer go."""
        value = self._core.streams.get(transfer)
        if value is None:
            piece = bytearray(size)
            self._early.setdefault(transfer, []).append((position, piece))
            return memoryview(piece)
        buffer = self._buffers.get(transfer)
        if buffer is None:
            buffer = self._buffers[transfer] = bytearray(value.size)
        return memoryview(buffer)[position : position + size]

    def arrived(self, transfer: int, size: int) -> None:
        """So many bytes have reached their window, and all messages before them the core."""
        value = self._core.streams.get(transfer)
        if value is None:  # of no value that this process was told of
            self._early.pop(transfer, None)
            return
        arrived = self._arrived.get(transfer, 0) + size
        if arrived < value.size:
            self._arrived[transfer] = arrived
            return
        self._arrived.pop(transfer, None)
        buffer = self._buffers.pop(transfer, None) or bytearray(value.size)
        for position, piece in self._early.pop(transfer, ()):
            buffer[position : position + len(piece)] = piece
        self._core.streamed(transfer, bytes(buffer))

"""The node's shared memory, as a process sees it: objects are read in place and written once.

A value that is read in place is pinned by the node until this process unpins it. The pin's owner is a small ctypes
array over the object's bytes: every view of them, down to a slice of a numpy array, keeps it alive, and when it dies
the object is unpinned.
"""

import ctypes
import itertools
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

from trio_ray.runtime.api.errors import RaySystemError
from trio_ray.runtime.api.link import Payload

MADV_POPULATE_WRITE = 23
"""Linux 5.14: fault pages in ahead. A first touch costs seven times a warm one."""
TWO_THREADS_BYTES = 16 << 20
"""From here on two threads copy: one does half of what the memory can."""


class _Pin(ref):  # type: ignore[type-arg]
    """Tells of the end of an owner."""

    __slots__ = ("object_id",)
    object_id: bytes


class SharedMemory:
    """The mapped arena of the node."""

    def __init__(self, path: str, size: int, unpinned: Callable[[bytes], None]) -> None:
        with Path(path).open("r+b", buffering=0) as file:
            self._map = mmap.mmap(file.fileno(), size)
        self._unpinned = unpinned
        self._pins: dict[int, _Pin] = {}
        """By their own identity (they cannot be hashed): a weak reference must live as long as what it refers to."""
        anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(anchor)
        self._warm = bytearray(-(-size // mmap.PAGESIZE))
        """A byte a page: whether this process has touched it. To ask the kernel costs a tenth of the copy."""
        self._writing = threading.Lock()
        self._writers = 0
        """Threads that are writing."""
        self._closed = False
        libc = ctypes.CDLL(None, use_errno=True)
        self._madvise: Any = libc.madvise
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    def adopt(self, object_id: bytes, offset: int, size: int) -> object:
        """The owner of a read pin of ``size`` bytes at ``offset``."""
        owner = (ctypes.c_ubyte * size).from_buffer(self._map, offset)
        pin = _Pin(owner, self._ended)
        pin.object_id = object_id
        self._pins[id(pin)] = pin
        return owner

    def _ended(self, pin: _Pin) -> None:
        self._pins.pop(id(pin), None)
        self._unpinned(pin.object_id)

    @staticmethod
    def view(owner: Any) -> memoryview:
        """The bytes that an owner pins; not to be written."""
        return memoryview(owner).cast("B")

    def write(self, offset: int, parts: list[tuple[int, Payload]], size: int, *, threads: int = 0) -> None:
        """Write an object's parts at ``offset``, with so many copying threads (0: one, two for large objects)."""
        with self._writing:
            if self._closed:
                raise RaySystemError("this process has left the cluster while an object was being written")
            self._writers += 1
        try:
            self._write(offset, parts, size, threads)
        finally:
            with self._writing:
                self._writers -= 1

    def close(self) -> None:
        """Give the memory back, if no view of it is out: otherwise it goes with the last of them."""
        with self._writing:
            self._closed = True
            if not self._writers:
                try:
                    self._map.close()
                except BufferError:
                    pass

    def _write(self, offset: int, parts: list[tuple[int, Payload]], size: int, threads: int) -> None:
        threads = threads or (2 if size >= TWO_THREADS_BYTES else 1)
        share = -(-size // threads // mmap.PAGESIZE) * mmap.PAGESIZE or mmap.PAGESIZE
        begin = offset - offset % mmap.PAGESIZE  # threads meet at page boundaries
        bounds = [min(max(begin + share * index, offset), offset + size) for index in range(threads)] + [offset + size]
        helpers = [
            threading.Thread(target=self._write_range, args=(offset, parts, first, last), name="trio-ray-copy")
            for first, last in itertools.pairwise(bounds[1:]) if first < last
        ]  # fmt: skip
        for helper in helpers:
            helper.start()
        self._write_range(offset, parts, bounds[0], bounds[1])
        for helper in helpers:
            helper.join()

    def _write_range(self, offset: int, parts: list[tuple[int, Payload]], begin: int, end: int) -> None:
        first, last = begin // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
        if self._warm.count(0, first, last):
            # An older kernel refuses; then the copy faults the pages in.
            self._madvise(self._address + first * mmap.PAGESIZE, end - first * mmap.PAGESIZE, MADV_POPULATE_WRITE)
            self._warm[first:last] = b"\1" * (last - first)
        for place, part in parts:
            start, stop = max(offset + place, begin), min(offset + place + len(part), end)
            if start < stop:
                self._copy(start, part, start - offset - place, stop - start)

    def _copy(self, to: int, part: Payload, at: int, count: int) -> None:
        if type(part) is bytes and count == len(part):
            ctypes.memmove(self._address + to, part, count)
            return
        view = memoryview(part)
        if view.readonly:
            source = _address_of(view)
            if source is None:
                self._map[to : to + count] = view[at : at + count]
                return
        else:
            source = ctypes.addressof(ctypes.c_char.from_buffer(view))
        ctypes.memmove(self._address + to, source + at, count)


class _Buffer(ctypes.Structure):
    """CPython's ``Py_buffer``, as far as it is needed to learn the address of read-only bytes."""

    _fields_ = [
        ("buf", ctypes.c_void_p), ("obj", ctypes.py_object), ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t), ("readonly", ctypes.c_int), ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p), ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p), ("internal", ctypes.c_void_p),
    ]  # fmt: skip


def _address_of(view: memoryview) -> int | None:
    """Where read-only bytes are; ctypes itself only tells of writable ones."""
    buffer = _Buffer()
    try:
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(buffer), 0)
    except BufferError:
        return None
    address = buffer.buf
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
    return address if isinstance(address, int) else None

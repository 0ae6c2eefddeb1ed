"""The node's shared memory: one anonymous file that its processes map.

A ``memfd`` has no name, so there is nothing to clean up: it is gone with the last process that maps it, however that
ended. Others open it through ``/proc``, which only the same user may.
"""

import ctypes
import mmap
import os

MADV_POPULATE_WRITE = 23
"""Linux 5.14; Python has no name for it yet."""


class SharedArena:
    """``size`` bytes of shared memory, none of which costs anything until it is touched."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._fd = os.memfd_create("trio-ray-arena", os.MFD_CLOEXEC)
        os.ftruncate(self._fd, max(size, mmap.PAGESIZE))
        self._map = mmap.mmap(self._fd, max(size, mmap.PAGESIZE))
        self.view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        # Through ctypes, which lets other threads run meanwhile; the mmap object's own madvise does not.
        self._madvise = ctypes.CDLL(None).madvise
        self._madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

    @property
    def path(self) -> str:
        """What other processes of this user open to map it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def populate(self, offset: int, size: int) -> None:
        """Fault pages in ahead of a transfer (a first touch costs seven times a warm one), from any thread."""
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        # A kernel before 5.14 refuses: then the copy faults the pages in.
        self._madvise(self._address + begin, offset + size - begin, MADV_POPULATE_WRITE)

    def close(self) -> None:
        """Unmap and close; views that are still out keep the memory until they are gone."""
        self.view.release()
        try:
            self._map.close()
        except BufferError:
            pass  # a transfer's view is still in flight; the mapping goes with the process
        os.close(self._fd)

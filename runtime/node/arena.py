"""The node's shared memory: one anonymous file that its processes map.

A ``memfd`` has no name, so there is nothing to clean up: it is gone with the last process that maps it, however that
ended. Others open it through ``/proc``, which only the same user may.
"""

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

    @property
    def path(self) -> str:
        """What other processes of this user open to map it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def populate(self, offset: int, size: int) -> None:
        """Fault pages in ahead of a transfer (a first touch costs seven times a warm one), if the kernel can."""
        begin = offset // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._map.madvise(MADV_POPULATE_WRITE, begin, offset + size - begin)
        except (OSError, ValueError):
            pass  # an older kernel: the copy faults the pages in

    def close(self) -> None:
        """Unmap and close; views that are still out keep the memory until they are gone."""
        self.view.release()
        try:
            self._map.close()
        except BufferError:
            pass  # a transfer's view is still in flight; the mapping goes with the process
        os.close(self._fd)

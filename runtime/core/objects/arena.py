"""Where in a node's shared memory objects lie: a first-fit allocator over one range of bytes.

First fit from low addresses keeps the upper part of the arena untouched for as long as possible, so that memory whose
pages are already faulted in is used again first (a first touch costs seven times a warm one, DESIGN section 6).
"""

from bisect import bisect_left, insort

ALIGNMENT = 64
"""Bytes; a cache line, and what numpy and SIMD code like."""


class Arena:
    """The free and used ranges of ``size`` bytes. Offsets and sizes are multiples of ``ALIGNMENT``."""

    def __init__(self, size: int) -> None:
        self.size = size // ALIGNMENT * ALIGNMENT
        self.used = 0
        self._free: list[tuple[int, int]] = [(0, self.size)] if self.size else []
        """Free ranges ``(offset, size)``, by offset, never adjacent to each other."""
        self._taken: dict[int, int] = {}
        """Size by offset of every allocation."""

    def allocate(self, size: int) -> int | None:
        """The offset of ``size`` fresh bytes, or None if no free range is that large."""
        size = max(ALIGNMENT, -(-size // ALIGNMENT) * ALIGNMENT)
        for index, (offset, length) in enumerate(self._free):
            if length >= size:
                if length == size:
                    del self._free[index]
                else:
                    self._free[index] = (offset + size, length - size)
                self._taken[offset] = size
                self.used += size
                return offset
        return None

    def free(self, offset: int) -> None:
        """Give back an allocation. Raises KeyError for an offset that ``allocate`` did not return."""
        size = self._taken.pop(offset)
        self.used -= size
        index = bisect_left(self._free, (offset, 0))
        if index < len(self._free) and self._free[index][0] == offset + size:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == offset:
            offset, before = self._free.pop(index - 1)
            size += before
        insort(self._free, (offset, size))

    def validate(self) -> None:
        """Assert that free and used ranges tile the arena exactly."""
        ranges = sorted([*self._free, *self._taken.items()])
        end = 0
        for offset, size in ranges:
            assert offset == end and size > 0, f"gap or overlap at {end}: next range is ({offset}, {size})"
            end = offset + size
        assert end == self.size
        assert self.used == sum(self._taken.values())
        assert all(a + b < c for (a, b), (c, _) in zip(self._free, self._free[1:], strict=False)), "unmerged ranges"

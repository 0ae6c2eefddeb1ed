"""Looking for an answer, or a node for the next call, for a moment before sleeping until it comes.

One small task at a time takes about 200 µs, of which a quarter is being put to sleep and woken. Worse, a caller that
sleeps leaves its core idle, so that the kernel spreads the processes on the path over the cores and every hop wakes
one of them up. A caller that stays awake keeps one core, and the others hand over to each other on the next, which
costs a few microseconds: 2,700 calls a second became 4,200 on two cores.
"""

import os

SPIN_S = 0.001
"""How long to look: some times what a small task takes, so that a hiccup does not end a run of them."""
MAX_SKIPPED = 256


class Spinning:
    """Decides whether the next wait spins. Threads may disturb its counts: they are for judging, no more."""

    def __init__(self) -> None:
        self._cores = len(os.sched_getaffinity(0))
        self._skip = 0
        self._misses = 0

    def worth_it(self, outstanding: int) -> bool:
        """Whether to spin now, with so many results outstanding: not if there is one for every core to work on, and
        ever more seldom while it is in vain."""
        if outstanding >= self._cores:
            return False
        if self._skip:
            self._skip -= 1
            return False
        return True

    def learn(self, *, arrived: bool) -> None:
        """How the last spin ended."""
        if arrived:
            self._misses = 0
        else:
            self._misses += 1
            self._skip = min(1 << self._misses, MAX_SKIPPED)

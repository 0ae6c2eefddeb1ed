"""Reads sockets the moment Trio's loop wakes up, before any task runs.

A task that waits for its socket costs Trio's bookkeeping twice, before it reads and before the loop comes to rest and
what it decided is sent: some 20 µs that whoever waits for the answer waits too. Here the sockets sit in an epoll of
their own. One task waits for that, only so that the loop wakes; what has arrived is read in the loop's hook
``after_io_wait``, and answered there. Trio's bookkeeping comes after that, while others work on the answer.
"""

import select
import time
from collections.abc import Callable

import trio

TURN_S = 0.005
"""How long to look for sockets that became readable meanwhile, before Trio's tasks have their turn."""


class EagerReads(trio.abc.Instrument):
    """Calls back for each socket that is readable, then once for all: ``flush`` sends what the calls decided.

    ``flush`` is called again when the tasks of a round have run: what they decide leaves then, as one frame for each
    receiver and with nobody's timer. It answers whether it woke a task. If it did not, and the loop is about to sleep,
    ``rest`` is called with the seconds for which it may.
    """

    def __init__(self, flush: Callable[[], bool], rest: Callable[[float], None] | None = None) -> None:
        self._flush = flush
        self._rest = rest
        self._epoll = select.epoll()
        self._readers: dict[int, Callable[[], None]] = {}
        self._token = trio.lowlevel.current_trio_token()
        self._scope = trio.CancelScope()
        self._failure: Exception | None = None

    def add(self, fd: int, read: Callable[[], None]) -> None:
        """Call ``read`` whenever ``fd`` is readable (or at its end), until ``remove``. It must not raise."""
        self._readers[fd] = read
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Call no more; before ``fd`` is closed. One that was never added is ignored."""
        if self._readers.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except OSError:
                pass  # it is closed already

    async def run(self) -> None:
        """Make Trio's loop wake when a socket is readable, until cancelled. Raises what a flush raised."""
        trio.lowlevel.add_instrument(self)
        try:
            with self._scope:
                while True:
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
        finally:
            trio.lowlevel.remove_instrument(self)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """When nobody adds or removes any more."""
        self._epoll.close()

    def look(self, seconds: float) -> bool:
        """Stay awake for at most so long, until a socket is readable; whether one is."""
        poll, clock = self._epoll.poll, time.monotonic
        end = clock() + seconds
        while not poll(0):
            if clock() >= end:
                return False
        return True

    def wake(self) -> None:
        """Let the loop go round once more, and so flush; from any thread. Nothing happens when it has ended."""
        try:
            self._token.run_sync_soon(_nothing, idempotent=True)
        except trio.RunFinishedError:
            pass

    def after_io_wait(self, timeout: float) -> None:
        """The loop has woken. What is called here may make tasks runnable: they run right after."""
        try:
            until = 0.0
            while ready := self._epoll.poll(0):
                for fd, _ in ready:
                    read = self._readers.get(fd)
                    if read is not None:
                        read()
                self._flush()
                now = time.monotonic()
                if not until:
                    until = now + TURN_S
                elif now >= until:
                    break
        except Exception as error:  # Trio would log it and go on without us
            self._fail(error)

    def before_io_wait(self, timeout: float) -> None:
        """Trio has nothing else to run now. What the flush wakes must not wait for the next I/O."""
        try:
            if self._flush():
                self.wake()
            elif self._rest is not None and timeout > 0:
                self._rest(timeout)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._scope.cancel()
        self.wake()


def _nothing() -> None:
    pass

"""What the API needs of the connection between a process and its node, real or simulated.

The API decides nothing about sockets, threads or clocks: it hands messages to the link's ``ClientCore``, says when they
may leave, and waits through the link. Real links are in ``runtime.client``, simulated ones in ``simulate``.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from trio_ray.runtime.core.client import ClientCore
from trio_ray.runtime.core.messages import Address, Value

Payload = bytes | bytearray | memoryview
Write = Callable[[memoryview], None]
"""Writes an object into the buffer it is given, which has the size that was asked for."""


class Link(Protocol):
    """The connection of one process."""

    core: ClientCore
    process: Address
    """This process; the name of its job, if it is a driver."""
    node: Address
    inline_limit: int
    """Values up to so many bytes travel in messages; larger ones go through the object store."""
    threaded: bool
    """Whether news may arrive on another thread than the one that waits for it."""

    def now(self) -> float:
        """The node's clock, in seconds; deadlines are on it."""

    def flush_soon(self) -> None:
        """Something was added to the core: send it when a batch is worth it, or after a millisecond or two."""

    def flush(self) -> None:
        """Send what was added, now."""

    def wait(self, object_ids: Sequence[bytes], count: int, timeout: float | None, *, fetch: bool) -> bool:
        """Block this thread until ``count`` of these exist (``fetch``: can be read here).

        ``timeout`` is in seconds, None without end. False if it passed. Raises ``ConnectionError`` when the link is
        lost.
        """

    def payload(self, value: Value, owner: object) -> Payload:
        """The bytes of a value that is here, without a copy; a shared one is read through its ``owner``."""

    def store(self, object_id: bytes, size: int, write: Write) -> int:
        """Make a large object: get room in the object store, have it written; its offset there.

        Blocks this thread. The object is not sealed yet: a ``SealObjects`` or a task's result does that. Raises
        ``MemoryError`` with a sentence when there is no room.
        """

    async def store_async(self, object_id: bytes, size: int, write: Write) -> int:
        """``store`` for a Trio task."""

    def ask(self, subject: str, argument: str) -> bytes:
        """Block this thread for the answer to a ``Query``, msgpack-encoded; ``LookupError`` if it is an error."""

    def wait_begins(self) -> None:
        """The calling task of a worker is about to wait: its CPU may be lent out. Nothing to do for a driver."""

    def wait_ends(self) -> None:
        """It goes on."""

"""What the API needs of the connection between a process and its node, real or simulated.

The API decides nothing about sockets, threads or clocks: it hands messages to the link's ``ClientCore``, says when they
may leave, and waits through the link. Real links are in ``runtime.client``, simulated ones in ``simulate``.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from trio_ray.runtime.core.client import ClientCore
from trio_ray.runtime.core.messages import Address, Value

if TYPE_CHECKING:
    from trio_ray.runtime.api.serialize import Packed

Payload = bytes | bytearray | memoryview


class Link(Protocol):
    """The connection of one process."""

    core: ClientCore
    process: Address
    """This process; the name of its job, if it is a driver."""
    node: Address
    inline_limit: int
    """Values up to so many bytes travel in messages; larger ones go through the object store."""

    @property
    def lock(self) -> AbstractContextManager[bool | None]:
        """Held around what the core allows only one thread at a time."""

    def now(self) -> float:
        """The node's clock, in seconds; deadlines are on it."""

    def flush_soon(self) -> None:
        """Something was added to the core: send it when a batch is worth it, or after a millisecond or two."""

    def flush(self) -> None:
        """Send what was added, now. Raises ``RaySystemError`` when the link is lost."""

    def wait(
        self, object_ids: Sequence[bytes], count: int, timeout: float | None, *, fetch: bool,
        stop_at_error: bool = False,
    ) -> bool:  # fmt: skip
        """Block this thread until ``count`` of these exist (``fetch``: can be read here), or one is an error.

        ``timeout`` is in seconds, None without end; False if it passed. Raises ``RaySystemError`` when the link is
        lost.
        """

    def payload(self, value: Value, owner: object) -> Payload:
        """The bytes of a value that is here, without a copy; a shared one is read through its ``owner``."""

    def store(self, object_id: bytes, packed: "Packed") -> int:
        """Write a large object into the object store, blocking this thread; its offset there.

        It is not sealed yet: a ``SealObjects`` or a task's result does that. Raises ``ObjectStoreFullError``.
        """

    def ask(self, subject: str, argument: str = "") -> bytes:
        """Block this thread for the answer to a ``Query``, msgpack-encoded; ``LookupError`` if it is an error."""

    def call_soon(self, callback: Callable[[], None]) -> Callable[[], None]:
        """``callback`` wrapped for the core to call: it runs with no lock held, and in Trio's thread if this is it."""

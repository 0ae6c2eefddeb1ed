"""A Trio program on a blocking connection: Trio's loop reads the socket when it is readable, and no other thread does.

Sending never waits for long (the node always reads), so frames are sent directly; those that can wait leave together
at the end of Trio's round.
"""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import trio

from trio_ray.runtime.api.errors import RaySystemError
from trio_ray.runtime.client.sync import SyncConnection
from trio_ray.runtime.transport.eager import EagerReads


@asynccontextmanager
async def read_in_trio(connection: SyncConnection) -> AsyncIterator[None]:
    """Within the block, Trio reads the connection."""
    thread = threading.get_ident()

    def flush() -> bool:
        if connection.core.failure or not connection.pending:
            return False
        try:
            connection.flush()
        except RaySystemError:
            return True  # whoever waits was told just now, and is to run
        return connection.pending  # of other threads, which may go on without end: the next round's

    def flush_later() -> None:
        if threading.get_ident() != thread:  # in Trio's own, the round ends with a flush anyway
            eager.wake()

    def read() -> None:
        try:
            connection.read_if_free()
        except RaySystemError:
            pass  # whoever waits was told
        if connection.core.failure:
            eager.remove(fd)

    fd = connection.fileno()
    with closing(EagerReads(flush)) as eager:
        connection.hand_to_trio(flush_later)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(eager.run)
                eager.add(fd, read)
                try:
                    yield
                finally:
                    nursery.cancel_scope.cancel()
        finally:
            connection.hand_to_trio(None)

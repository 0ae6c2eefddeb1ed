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
from trio_ray.runtime.transport.spinning import Spinning

SPIN_S = 0.0005
"""How long a driver stays awake for an answer. Its program's other I/O waits meanwhile, so less than elsewhere."""


@asynccontextmanager
async def read_in_trio(connection: SyncConnection, *, spin: bool = False) -> AsyncIterator[None]:
    """Within the block, Trio reads the connection.

    ``spin``, for drivers, whose tasks wait for answers: before Trio's loop sleeps it looks for one for a moment, if
    that has paid off lately.
    """
    thread = threading.get_ident()
    spinning = Spinning()

    def rest(seconds: float) -> None:
        expected = connection.core.expected
        if expected and spinning.worth_it(expected):
            spinning.learn(arrived=eager.look(min(seconds, SPIN_S)))

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
    with closing(EagerReads(flush, rest if spin else None)) as eager:
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

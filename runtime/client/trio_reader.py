"""A Trio program on a blocking connection: a Trio task reads the socket when it is readable, and no other thread does.

Sending never waits for long (the node always reads), so frames are sent directly; those that can wait leave together
at the end of Trio's round.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from trio_ray.runtime.api.errors import RaySystemError
from trio_ray.runtime.client.sync import SyncConnection


@asynccontextmanager
async def read_in_trio(connection: SyncConnection) -> AsyncIterator[None]:
    """Within the block, Trio reads the connection."""
    token = trio.lowlevel.current_trio_token()
    scheduled = False

    def flush_now() -> None:
        nonlocal scheduled
        scheduled = False
        if connection.pending and not connection.core.failure:
            try:
                connection.flush()
            except RaySystemError:
                pass  # whoever waits is told

    def flush_later() -> None:
        nonlocal scheduled
        if not scheduled:
            scheduled = True
            try:
                token.run_sync_soon(flush_now)
            except trio.RunFinishedError:
                pass

    connection.hand_to_trio(flush_later)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_read, connection)
            try:
                yield
            finally:
                nursery.cancel_scope.cancel()
    finally:
        connection.hand_to_trio(None)


async def _read(connection: SyncConnection) -> None:
    while not connection.core.failure:
        await trio.lowlevel.wait_readable(connection.fileno())
        connection.read_if_free()

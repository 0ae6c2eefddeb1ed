"""Waiting for objects without blocking the thread: under Trio, under asyncio, or as a future."""

import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from trio_ray.runtime.api.context import current
from trio_ray.runtime.api.errors import RayError, RaySystemError
from trio_ray.runtime.api.refs import ObjectRef
from trio_ray.runtime.core.waiter import Waiter

if TYPE_CHECKING:
    from concurrent.futures import Future

    from trio_ray.runtime.api.session import Session


async def wait_in_trio(
    session: "Session", object_ids: Sequence[bytes], count: int, *, fetch: bool, stop_at_error: bool = False
) -> bool:
    """``Link.wait`` for a Trio task, as long as its cancel scopes allow; True if an error ended the wait."""
    import trio

    link, core = session.link, session.core
    task = trio.lowlevel.current_task()
    asleep = True

    def resume() -> None:
        nonlocal asleep
        if asleep:
            asleep = False
            trio.lowlevel.reschedule(task)

    waiter = Waiter(
        core, object_ids, count, link.call_soon(resume), fetch=fetch, stop_at_error=stop_at_error
    )  # fmt: skip
    with link.lock:
        there = waiter.start()
        if not there:
            session.wait_begins()
    if there:
        await trio.lowlevel.checkpoint()
    else:

        def abort(raise_cancel: Any) -> "trio.lowlevel.Abort":
            nonlocal asleep
            asleep = False
            with link.lock:
                waiter.cancel()
            return trio.lowlevel.Abort.SUCCEEDED

        link.flush_soon()
        try:
            await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            with link.lock:
                session.wait_ends()
            link.flush_soon()
    if core.failure:
        raise RaySystemError(core.failure)
    return waiter.failed


async def value_in_trio(session: "Session", ref: ObjectRef) -> Any:
    """The object's value; raises it if it is an error."""
    await wait_in_trio(session, (ref,), 1, fetch=True)
    value = session.read(ref)
    if isinstance(value, RayError) and session.is_error(ref):
        try:
            raise value
        finally:  # or it and this frame, with the references in it, would keep each other alive
            del value
    return value


class SessionWaiting:
    """How references are awaited: through the session of the running task."""

    def future(self, ref: ObjectRef) -> "Future[Any]":
        """A future of the object's value, completed by whichever thread reads the news."""
        from concurrent.futures import Future

        session = current().session
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()

        def complete() -> None:
            try:
                if session.core.failure:
                    raise RaySystemError(session.core.failure)
                value = session.read(ref)
            except Exception as error:
                future.set_exception(error)
                return
            if isinstance(value, RayError) and session.is_error(ref):
                future.set_exception(value)
            else:
                future.set_result(value)

        waiter = Waiter(
            session.core, (ref,), 1, session.link.call_soon(complete), fetch=True, stop_at_error=False
        )  # fmt: skip
        with session.link.lock:
            there = waiter.start()
        if there:
            complete()
        else:
            session.link.flush_soon()
        return future

    def awaited(self, ref: ObjectRef) -> Generator[Any, Any, Any]:
        """What ``await ref`` runs."""
        trio = sys.modules.get("trio")
        if trio is not None and trio.lowlevel.in_trio_run():
            return value_in_trio(current().session, ref).__await__()
        import asyncio

        return asyncio.wrap_future(self.future(ref)).__await__()

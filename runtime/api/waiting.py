"""Waiting for objects without blocking the thread: under Trio, under asyncio, or as a future."""

import sys
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

from trio_ray.runtime.api.context import current
from trio_ray.runtime.api.errors import RayError, RaySystemError, TaskCancelledError
from trio_ray.runtime.api.refs import ObjectRef
from trio_ray.runtime.core.messages import Where
from trio_ray.runtime.core.waiter import Waiter

ELSEWHERE = Where.ELSEWHERE
CLOCKS_S = 0.05
"""How far the clocks of a node and a driver elsewhere may be apart: half of what a message takes there and back."""
TURN_S, TURN = 0.001, 100
"""How long, and how often, tasks that wait for what is there may do so without letting others run."""

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
        await let_others_run(session)
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


async def let_others_run(session: "Session") -> None:
    """The checkpoint of a wait for what is there already.

    A round through Trio's loop costs ten times what is left of such a wait. So cancellation is noticed every time, but
    other tasks have their turn once in ``TURN_S``, or in ``TURN`` times, for in simulation no time passes.
    """
    import trio

    session.turns += 1
    now = session.link.now()
    if now < session.turn_ends and session.turns < TURN:
        await trio.lowlevel.checkpoint_if_cancelled()
    else:
        await trio.lowlevel.checkpoint()
        session.turns, session.turn_ends = 0, session.link.now() + TURN_S


async def hear_deadline(deadline: float) -> None:
    """A task was cancelled, perhaps because of the ``deadline`` (on Trio's clock) around whoever waits for it.

    The cluster may have noticed it before Trio did: then this raises ``trio.Cancelled``, which is what the waiter is to
    hear. A node elsewhere keeps a clock of its own, so a deadline that is about to pass counts.
    """
    import trio

    left = deadline - trio.current_time()
    with trio.CancelScope(shield=True):
        await trio.sleep(left if 0 < left < CLOCKS_S else 0)
    await trio.lowlevel.checkpoint()


async def value_in_trio(session: "Session", ref: ObjectRef) -> Any:
    """The object's value; raises it if it is an error."""
    import trio

    if session.core.readable(ref):
        await let_others_run(session)
    else:
        await wait_in_trio(session, (ref,), 1, fetch=True)
    value = session.read(ref)
    if isinstance(value, RayError) and session.is_error(ref):
        try:
            if isinstance(value, TaskCancelledError):
                await hear_deadline(trio.current_effective_deadline())
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


# -- wait(): which of the objects are ready, and which are left --------------------------------------------------------


class Left:
    """The list of references that ``wait`` left last.

    Programs wait for one of a thousand, a thousand times, each time for what the last wait left, which was looked
    through then. So a list is not checked again if it is where that one was, and as long: one that was changed since,
    or has taken its place, passes too, until there is something to wait for.
    """

    __slots__ = ("fetch", "heard", "length", "place", "where")

    def __init__(self) -> None:
        self.where = 0
        """The list's ``id``: a reference to it would keep all of its objects alive."""
        self.length = 0
        self.place = 0
        """Nothing before this was ready then."""
        self.heard = 0
        """``ClientCore.heard`` then."""
        self.fetch = False


def next_ready(
    session: "Session", refs: Sequence[ObjectRef], *, fetch: bool
) -> tuple[list[ObjectRef], list[ObjectRef]] | None:
    """``split`` for the first that is ready of what the last ``wait`` left; None for another list, or if none is."""
    left, end = session.left, len(refs)
    if left.where != id(refs) or left.length != end or type(refs) is not list:
        return None
    values, heard = session.core.values, session.core.heard
    place = left.place if left.heard == heard and left.fetch == fetch else 0
    while place < end:
        value = values.get(refs[place])
        if value is not None and not (fetch and value.where is ELSEWHERE and refs[place] not in session.core.stored):
            rest = refs[:place] + refs[place + 1 :] if place else refs[1:]
            left.where, left.length, left.place, left.heard, left.fetch = id(rest), end - 1, place, heard, fetch
            return [refs[place]], rest
        place += 1
    return None


def check_wait(refs: Sequence[ObjectRef], num_returns: int, return_when: str) -> None:
    """Raise for what ``wait`` cannot wait for."""
    try:
        b"".join(refs)
    except TypeError:
        wrong = next(ref for ref in refs if not isinstance(ref, ObjectRef))
        raise TypeError(f"wait() takes a list of ObjectRefs; it was given {wrong!r}") from None
    if not refs:
        raise ValueError("wait() was given an empty list; there is nothing to wait for")
    if len(set(refs)) != len(refs):
        raise ValueError("wait() was given the same reference twice; each may be in the list once")
    if isinstance(num_returns, bool) or not isinstance(num_returns, int) or num_returns <= 0:
        raise ValueError(f"num_returns is a number above zero, not {num_returns!r}")
    if num_returns > len(refs):
        raise ValueError(f"num_returns is {num_returns}, but there are only {len(refs)} references to wait for")
    if return_when not in ("num_returns", "first_error"):
        raise ValueError(f"return_when is 'num_returns' or 'first_error', not {return_when!r}")


def split(
    session: "Session", refs: Sequence[ObjectRef], num_returns: int, *, fetch: bool
) -> tuple[list[ObjectRef], list[ObjectRef]]:
    """At most ``num_returns`` of the objects that exist (``fetch``: are here), and the rest, in the order given."""
    ready: list[ObjectRef] = []
    rest: list[ObjectRef] = []
    values, stored = session.core.values, session.core.stored
    position = 0
    for ref in refs:
        value = values.get(ref)
        position += 1
        if value is None or (fetch and value.where is ELSEWHERE and ref not in stored):
            rest.append(ref)
            continue
        ready.append(ref)
        if len(ready) == num_returns:
            break
    if rest:
        rest += refs[position:]
    else:
        rest = refs[position:] if type(refs) is list else list(refs[position:])
    left = session.left
    left.where, left.length, left.place = id(rest), len(rest), 0
    return ready, rest

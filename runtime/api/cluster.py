"""The cluster as a Trio program sees it. The same object stands on a real link or a simulated one."""

from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec

from trio_ray.runtime.api import timeline
from trio_ray.runtime.api.actors import ActorClass, ActorHandle, get_actor, make_actor_class
from trio_ray.runtime.api.context import current
from trio_ray.runtime.api.errors import TaskCancelledError
from trio_ray.runtime.api.nursery import Nursery, start
from trio_ray.runtime.api.refs import ObjectRef
from trio_ray.runtime.api.session import Session
from trio_ray.runtime.api.waiting import check_wait, hear_deadline, split, value_in_trio, wait_in_trio


class Cluster:
    """A cluster. Awaiting is subject to Trio's cancel scopes: cancelled, it stops waiting, and the task goes on."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def submit(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Run ``function`` as a task; a reference to its result, which can be awaited.

        ``function`` is a remote function, an actor's method or a plain function. Keyword arguments are options
        (``num_cpus=2``); bind the function's own with ``functools.partial``.
        """
        return start(current(), function, args, options)

    def actor(self, cls: ActorClass | type, *args: Any, **options: Any) -> ActorHandle:
        """Make an actor of an actor class (or a plain class); its handle, at once."""
        actor_class = cls if isinstance(cls, ActorClass) else make_actor_class(cls, {})
        handle: ActorHandle = start(current(), actor_class, args, options)
        return handle

    def get_actor(self, name: str, namespace: str | None = None) -> ActorHandle:
        """The living actor of this name. Raises ValueError if there is none."""
        return get_actor(name, namespace)

    async def get(self, ref: ObjectRef) -> Any:
        """The value of an object; raises it if it is an error. The same as ``await ref``."""
        return await value_in_trio(self._session, ref)

    async def gather(self, refs: Sequence[ObjectRef], *, return_exceptions: bool = False) -> list[Any]:
        """The values of objects, in order. Raises the first error as soon as it is known, unless
        ``return_exceptions``."""
        import trio

        wanted = list(refs)
        await wait_in_trio(self._session, wanted, len(wanted), fetch=True, stop_at_error=not return_exceptions)
        session = self._session
        if session.core.some_error and not return_exceptions:
            for ref in wanted:
                if session.is_error(ref):
                    error = session.read(ref)
                    try:
                        if isinstance(error, TaskCancelledError):
                            await hear_deadline(trio.current_effective_deadline())
                        raise error
                    finally:  # or it and this frame, with the references in it, would keep each other alive
                        del error
        return session.read_all(wanted, return_exceptions=return_exceptions)

    async def as_completed(self, refs: Sequence[ObjectRef]) -> AsyncIterator[ObjectRef]:
        """The references, in the order in which their objects come into being."""
        import trio

        session, link, core = self._session, self._session.link, self._session.core
        left: dict[bytes, ObjectRef] = {ref: ref for ref in refs}
        arrived: deque[bytes] = deque()
        news = trio.Event()
        told = link.call_soon(lambda: news.set())

        def on_news(object_id: bytes) -> None:
            arrived.append(object_id)
            told()

        with link.lock:
            missing = [object_id for object_id in left if core.values.get(object_id) is None]
            core.want(missing, fetch=False)
            for object_id in missing:
                core.watch(object_id, on_news)
        link.flush_soon()
        waited = set(missing)
        arrived.extendleft([object_id for object_id in reversed(list(left)) if object_id not in waited])
        try:
            while left:
                while arrived:
                    ref = left.pop(arrived.popleft(), None)
                    if ref is not None:
                        yield ref
                if left:
                    with link.lock:
                        session.wait_begins()
                    link.flush_soon()
                    try:
                        await news.wait()
                    finally:
                        with link.lock:
                            session.wait_ends()
                    news = trio.Event()
        finally:
            with link.lock:
                for object_id in left:
                    core.unwatch(object_id, on_news)

    async def wait(
        self, refs: Sequence[ObjectRef], *, num_returns: int = 1, timeout: float | None = None,
        return_when: str = "num_returns",
    ) -> tuple[list[ObjectRef], list[ObjectRef]]:  # fmt: skip
        """Wait until ``num_returns`` of the objects exist, or ``timeout`` seconds passed: those that do, and the rest.

        ``return_when="first_error"`` ends the wait as well when one of them is an error.
        """
        import trio

        wanted = list(refs)
        check_wait(wanted, num_returns, return_when)
        with trio.move_on_after(float("inf") if timeout is None else timeout):
            await wait_in_trio(
                self._session, wanted, num_returns, fetch=False, stop_at_error=return_when == "first_error"
            )  # fmt: skip
        return split(self._session, wanted, num_returns, fetch=False)

    async def put(self, value: object) -> ObjectRef:
        """Store a value; a reference to it."""
        return self._session.put(current(), value)

    def open_nursery(self) -> Nursery:
        """A block that its tasks do not outlive: ``async with cluster.open_nursery() as nursery``."""
        return Nursery()

    def now(self) -> float:
        """The cluster's clock in seconds: real time on a real cluster, simulated time in simulation."""
        return self._session.link.now()

    async def sleep(self, seconds: float) -> None:
        """Let so many seconds of the cluster's clock pass."""
        import trio

        await trio.sleep(seconds)

    async def nodes(self) -> list[dict[str, Any]]:
        """The nodes of the cluster: their addresses, resources and labels, and whether they are alive."""
        return msgspec.msgpack.decode(await self._ask("nodes"), type=list[dict[str, Any]])

    async def resources(self) -> dict[str, float]:
        """The resources of all living nodes together."""
        return msgspec.msgpack.decode(await self._ask("resources"), type=dict[str, float])

    async def timeline(self, filename: str | None = None) -> list[dict[str, Any]]:
        """The newest tasks that ran, as the events of a Chrome trace, also written to ``filename`` if given.

        Nodes report tasks in batches, so the last tenth of a second may be missing. ``simulate.recorded`` makes costs
        of the file.
        """
        events = timeline.chrome_events(await self._ask(timeline.SUBJECT, timeline.ARGUMENT))
        if filename is not None:
            timeline.save(events, filename)
        return events

    async def _ask(self, subject: str, argument: str = "") -> bytes:
        import trio

        link, answers, done = self._session.link, [], trio.Event()
        told = link.call_soon(done.set)

        def answered(answer: Any) -> None:
            answers.append(answer)
            told()

        with link.lock:
            self._session.core.ask(subject, argument, answered)
        link.flush_soon()
        await done.wait()
        if answers[0].error:
            raise LookupError(answers[0].error)
        body: bytes = answers[0].body
        return body

"""Counting references when many simulated processes share one Python process.

An ``ObjectRef`` is its id and nothing else; which process holds it is known to whoever made it, but not to the
reference when it dies. Two things tell. An id says which task submitted or put the object, hence in which process its
first reference came to be. And references that came out of values are entered here with the process whose code was
running. Where several processes hold one object, a dying reference is taken for the running one's; a mistake then (a
reference that dies in a garbage collection, say) moves the end of one process's hold to another, while the object
lives exactly as long as any reference to it does.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from trio_ray.runtime.api import context
from trio_ray.runtime.core import ids

if TYPE_CHECKING:
    from trio_ray.simulate.link import SimulatedLink

_PREFIX = ids.TASK_ID_BYTES - 5
"""Bytes of an id that all children of a task share."""


class Register:
    """All live references of a simulation that are not with the process that made the object."""

    def __init__(self, elsewhere: Callable[[bytes], None] = lambda object_id: None) -> None:
        self._elsewhere = elsewhere
        """Told of the end of references that are none of this simulation's."""
        self._makers: dict[bytes, SimulatedLink] = {}
        """The process of each task that has children or puts: by their prefix, and by its own id."""
        self._others: dict[bytes, list[SimulatedLink]] = {}
        """One entry a reference."""
        self._links: dict[int, SimulatedLink] = {}
        self.made = Log(self._make)
        self.dropped = Log(self._drop)
        """The two logs that ``refs.bind`` wants of a core."""

    def joined(self, link: "SimulatedLink") -> None:
        """A process has joined the simulation."""
        self._links[id(link.core)] = link

    def task(self, task: context.TaskContext, link: "SimulatedLink") -> None:
        """A task begins in a process: what it submits and puts is that process's."""
        self._makers[task.prefix] = link
        self._makers[task.task_id] = link

    def childless(self, task: context.TaskContext) -> None:
        """A task ended that neither submitted nor put anything."""
        del self._makers[task.prefix], self._makers[task.task_id]

    def _running(self) -> "SimulatedLink | None":
        task = context.current_or_none()
        return None if task is None else self._links.get(id(task.session.core))

    def _make(self, object_id: bytes) -> None:
        link = self._running()
        if link is None:
            return
        others = self._others.get(object_id)
        if others is None:
            self._others[object_id] = [link]
        else:
            others.append(link)
        link.core.made.append(object_id)

    def _drop(self, object_id: bytes) -> None:
        others = self._others.get(object_id)
        if others is None:
            link = self._makers.get(object_id[: ids.TASK_ID_BYTES] if ids.is_put(object_id) else object_id[:_PREFIX])
        else:
            link = self._running()
            if link in others:
                others.remove(link)
            elif link is None or object_id not in link.core.counts:
                link = others.pop()
            if not others:
                del self._others[object_id]
        if link is None:
            self._elsewhere(object_id)
        else:
            link.core.dropped.append(object_id)
            link.tidy_soon()


class Log:
    """One of the two logs, as ``refs.bind`` appends to it."""

    def __init__(self, append: Callable[[bytes], None]) -> None:
        self.append = append

    def extend(self, object_ids: Iterable[bytes]) -> None:
        """Append each of them."""
        for object_id in object_ids:
            self.append(object_id)

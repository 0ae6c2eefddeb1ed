"""Waiting for some of many objects, without looking at all of them at every piece of news."""

from collections.abc import Callable, Sequence

from trio_ray.runtime.core.client import ClientCore
from trio_ray.runtime.core.messages import Where


class Waiter:
    """Waits until ``count`` of ``object_ids`` are there, then calls ``callback`` once.

    With ``fetch`` an object is there when its bytes are, otherwise when it exists. With ``stop_at_error`` the first
    that is an error ends the wait. A lost link ends it too: look at ``ClientCore.failure``.

    Waiting for all watches one object at a time, the first that is missing: by the time it is there most of the others
    are as well. ``start`` and ``cancel`` belong to the core's one thread at a time; ``callback`` comes from there.
    """

    __slots__ = ("_at", "_callback", "_core", "_count", "_fetch", "_ids", "_left", "_stop_at_error", "_watched", "done",
                 "failed")  # fmt: skip

    def __init__(
        self, core: ClientCore, object_ids: Sequence[bytes], count: int, callback: Callable[[], None], *, fetch: bool,
        stop_at_error: bool,
    ) -> None:  # fmt: skip
        self._core = core
        self._ids = object_ids
        self._count = count
        self._callback = callback
        self._fetch = fetch
        self._stop_at_error = stop_at_error
        self._at = 0
        """When waiting for all: those before it are there."""
        self._left = 0
        """When waiting for some: how many are still to come."""
        self._watched: set[bytes] = set()
        self.done = False
        self.failed = False
        """An error ended the wait."""

    def start(self) -> bool:
        """Begin to wait; True if there was nothing to wait for, and ``callback`` is not called."""
        core, object_ids = self._core, self._ids
        if core.failure:
            self.done = True
            return True
        if self._count == len(object_ids):
            if self._advance():
                self.done = True
                return True
            self._watched.add(object_ids[self._at])
        else:
            self._watched = {object_id for object_id in object_ids if not self._there(object_id)}
            self._left = self._count - (len(object_ids) - len(self._watched))
            if self._left <= 0:
                self.done = True
                return True
        if self._stop_at_error:
            values = core.values
            for object_id in object_ids:
                value = values.get(object_id)
                if value is not None and value.error:
                    self.done = self.failed = True
                    return True
            core.error_watchers[self._on_error] = None
        core.want(object_ids, fetch=self._fetch)
        for object_id in self._watched:
            core.watch(object_id, self._news)
        return False

    def cancel(self) -> None:
        """Wait no longer; ``callback`` is not called any more."""
        self.done = True
        for object_id in self._watched:
            self._core.unwatch(object_id, self._news)
        self._watched.clear()
        self._core.error_watchers.pop(self._on_error, None)

    def _there(self, object_id: bytes) -> bool:
        value = self._core.values.get(object_id)
        return value is not None and not (self._fetch and value.where == Where.ELSEWHERE)

    def _advance(self) -> bool:
        """Move past those that are there; True if all are."""
        values, object_ids, fetch = self._core.values, self._ids, self._fetch
        at, end = self._at, self._count
        while at < end:
            value = values.get(object_ids[at])
            if value is None or (fetch and value.where == Where.ELSEWHERE):
                break
            at += 1
        self._at = at
        return at == end

    def _news(self, object_id: bytes) -> None:
        if self.done:
            return
        self._watched.discard(object_id)
        if self._core.failure:
            self._end()
        elif self._count == len(self._ids):
            if self._advance():
                self._end()
            else:
                self._watch(self._ids[self._at])
        elif not self._there(object_id):
            self._watch(object_id)  # it exists; its bytes are on their way
        else:
            self._left -= 1
            if not self._left:
                self._end()

    def _watch(self, object_id: bytes) -> None:
        self._watched.add(object_id)
        self._core.watch(object_id, self._news)

    def _on_error(self, object_id: bytes) -> None:
        if not self.done and object_id in self._ids:
            self.failed = True
            self._end()

    def _end(self) -> None:
        self.cancel()
        self._callback()

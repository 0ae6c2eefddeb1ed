"""Waiting for some of many objects, at a cost that follows the news, not the number of objects."""

from collections.abc import Callable, Sequence

from trio_ray.runtime.core.client import ClientCore
from trio_ray.runtime.core.messages import Where


class Waiter:
    """Waits until ``count`` of ``object_ids`` are there, then calls ``callback`` once.

    With ``fetch`` an object is there when its bytes are, otherwise when it exists. With ``stop_at_error`` the first
    that is an error ends the wait. A lost link ends it too: look at ``ClientCore.failure``.

    It hears of each batch of news as a whole. Waiting for all then looks at the first object that was missing, and
    moves on from there; waiting for one looks whether one of them is among the news; waiting for some keeps the set of
    those that are missing. ``start`` and ``cancel`` belong to the core's one thread at a time; ``callback`` comes from
    there.
    """

    __slots__ = ("_at", "_callback", "_core", "_count", "_fetch", "_ids", "_missing", "_stop_at_error", "done",
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
        self._missing: set[bytes] = set()
        """When waiting for some, but not for one: those that are not there."""
        self.done = False
        self.failed = False
        """An error ended the wait."""

    def start(self) -> bool:
        """Begin to wait; True if there was nothing to wait for, and ``callback`` is not called."""
        core, object_ids = self._core, self._ids
        if core.failure or self._is_met():
            self.done = True
            return True
        if self._stop_at_error:
            values = core.values
            for object_id in object_ids:
                value = values.get(object_id)
                if value is not None and value.error:
                    self.done = self.failed = True
                    return True
        core.want(object_ids, fetch=self._fetch)
        if len(object_ids) == 1:
            core.watch(object_ids[0], self._single_news)
        else:
            core.listeners[self] = None
        return False

    def _single_news(self, object_id: bytes) -> None:
        self.news((object_id,))
        if not self.done:  # it exists; its bytes are on their way
            self._core.watch(object_id, self._single_news)

    def _is_met(self) -> bool:
        object_ids, count = self._ids, self._count
        if count == len(object_ids):
            return self._advance()
        values, fetch, there = self._core.values, self._fetch, []
        if count == 1 and not (fetch and self._core.some_elsewhere):
            return any(map(values.get, object_ids))
        for object_id in object_ids:
            value = values.get(object_id)
            if value is not None and not (fetch and value.where == Where.ELSEWHERE):
                there.append(object_id)
                if len(there) == count:
                    return True
        if count > 1:
            self._missing = set(object_ids)
            self._missing.difference_update(there)
        return False

    def cancel(self) -> None:
        """Wait no longer; ``callback`` is not called any more."""
        self.done = True
        if len(self._ids) == 1:
            self._core.unwatch(self._ids[0], self._single_news)
        else:
            self._core.listeners.pop(self, None)

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

    def news(self, object_ids: Sequence[bytes]) -> None:
        """These became ready, or the link is lost."""
        if self.done:
            return
        values = self._core.values
        arrived = set(object_ids)
        if self._fetch and self._core.some_elsewhere:
            exist = {o for o in object_ids if (value := values.get(o)) is not None and value.where == Where.ELSEWHERE}
            if exist:
                self._core.want([object_id for object_id in self._ids if object_id in exist], fetch=True)
                arrived -= exist
        if self._count == len(self._ids):
            met = self._advance()
        elif self._count == 1:
            met = not arrived.isdisjoint(self._ids)
        else:
            self._missing -= arrived
            met = len(self._missing) <= len(self._ids) - self._count
        if self._stop_at_error and not met:
            for object_id in object_ids:
                value = values.get(object_id)
                if value is not None and value.error and object_id in self._ids:
                    self.failed = met = True
                    break
        if met or self._core.failure:
            self.cancel()
            self._callback()

"""A memory of the newest things only, for caches that must not grow."""

from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Recent(Generic[Key, Value]):
    """Remembers at least the ``kept`` newest entries, and at most twice as many.

    Two generations: when the young one is full it replaces the old one. Each operation is a dict operation or two.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._young: dict[Key, Value] = {}
        self._old: dict[Key, Value] = {}

    def get(self, key: Key) -> Value | None:
        """The entry's value, or None."""
        value = self._young.get(key)
        return self._old.get(key) if value is None else value

    def put(self, key: Key, value: Value) -> None:
        """Add or replace an entry, as the newest."""
        self._young[key] = value
        if len(self._young) >= self._kept:
            self._young, self._old = {}, self._young

    def drop(self, key: Key) -> None:
        """Forget an entry, if it is there."""
        self._young.pop(key, None)
        self._old.pop(key, None)

"""Who wants to be told of what: subscriptions by key, and what is owed to each subscriber at the end of a step."""

from collections.abc import Iterable
from typing import Generic, TypeVar

from trio_ray.runtime.core.messages import Address

Row = TypeVar("Row")


class Subscriptions:
    """Addresses by key, in the order in which they subscribed."""

    def __init__(self) -> None:
        self._by_key: dict[bytes, dict[Address, None]] = {}

    def __bool__(self) -> bool:
        return bool(self._by_key)

    def __contains__(self, key: bytes) -> bool:
        return key in self._by_key

    def add(self, key: bytes, who: Address) -> None:
        """``who`` wants to be told of ``key``."""
        subscribers = self._by_key.get(key)
        if subscribers is None:
            self._by_key[key] = {who: None}
        else:
            subscribers[who] = None

    def of(self, key: bytes) -> Iterable[Address]:
        """Those who want to be told."""
        return self._by_key.get(key, ())

    def take(self, key: bytes) -> Iterable[Address]:
        """Those who want to be told, for the last time: a callback is called once."""
        return self._by_key.pop(key, ())

    def drop_subscriber(self, who: Address) -> None:
        """``who`` is gone."""
        for key in [key for key, subscribers in self._by_key.items() if who in subscribers]:
            del self._by_key[key][who]
            if not self._by_key[key]:
                del self._by_key[key]

    def validate(self) -> None:
        """Assert that no key is kept for nobody."""
        assert all(self._by_key.values()), "a key without subscribers was kept"


class Outbox(Generic[Row]):
    """Rows to tell to addresses, one message each, when the step ends."""

    def __init__(self) -> None:
        self._rows: dict[Address, list[Row]] = {}

    def add(self, to: Address, row: Row) -> None:
        """Tell ``row`` to ``to``, after what it is told already."""
        rows = self._rows.get(to)
        if rows is None:
            self._rows[to] = [row]
        else:
            rows.append(row)

    def add_all(self, to: Iterable[Address], row: Row) -> None:
        """Tell ``row`` to each of ``to``."""
        for address in to:
            self.add(address, row)

    def drain(self) -> Iterable[tuple[Address, list[Row]]]:
        """What each address is to be told; empty afterwards."""
        if not self._rows:
            return ()
        rows, self._rows = self._rows, {}
        return rows.items()

    def drop(self, to: Address) -> None:
        """``to`` is gone."""
        self._rows.pop(to, None)

    def __bool__(self) -> bool:
        return bool(self._rows)

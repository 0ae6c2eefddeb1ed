"""Telling processes of the objects they wait for: by value when small, in the arena when they map it, else as a stream.

What a process submitted it is told of without asking: a small result by value, a large one by its existence, so that
nothing is pinned for a process that may never look.
"""

from functools import partial

from trio_ray.runtime.core.effects import AnyEffect, Send
from trio_ray.runtime.core.messages import Address, ObjectsReady, Value, Where
from trio_ray.runtime.core.objects.table import ObjectEntry, ObjectTable, State
from trio_ray.runtime.core.objects.transfer import Transfers


class Delivery:
    """The processes of this node, and what this step has for them."""

    def __init__(self, table: ObjectTable, transfers: Transfers) -> None:
        self._table = table
        self._transfers = transfers
        self.processes: dict[Address, bool] = {}
        """Connected processes, and whether they share memory with the node."""
        self.ready: dict[Address, list[Value]] = {}
        """What processes wait for and this step made ready."""
        self._streams: list[tuple[ObjectEntry, Address, int]] = []
        """Objects to send, after ``ready``, to processes that share no memory with the node."""

    def want(self, process: Address, entry: ObjectEntry, *, fetch: bool) -> bool:
        """A process wants to know when an object is ready and, with ``fetch``, to read it. False if it is not here."""
        if entry.local or (entry.state == State.ELSEWHERE and not fetch):
            self._hand_over(process, fetch, entry)
            return True
        waiter = partial(self._hand_over, process, fetch)
        if entry.waiters is None:
            entry.waiters = [waiter]
        else:
            entry.waiters.append(waiter)
        return False

    def _hand_over(self, process: Address, fetch: bool, entry: ObjectEntry) -> None:
        shares_memory = self.processes.get(process)
        if shares_memory is None:
            return
        if entry.state != State.SHARED or not fetch:
            self.tell(process, entry)
        elif shares_memory:
            self.ready.setdefault(process, []).append(self._table.value(entry, process))
        else:
            transfer = self._transfers.new_transfer()
            value = Value(entry.object_id, Where.STREAMED, b"", transfer, entry.size)
            self.ready.setdefault(process, []).append(value)
            self._streams.append((entry, process, transfer))

    def tell(self, process: Address, entry: ObjectEntry) -> None:
        """Tell a process that an object is ready; a large one it can then ask for."""
        if entry.state == State.INLINE:
            value = Value(entry.object_id, Where.INLINE, entry.payload, 0, entry.size, entry.error)
        else:
            value = Value(entry.object_id, Where.ELSEWHERE, b"", 0, entry.size)
        values = self.ready.get(process)
        if values is None:
            self.ready[process] = [value]
        else:
            values.append(value)

    def flush(self, effects: list[AnyEffect]) -> None:
        """Send what this step made ready."""
        if self.ready:
            for process, values in self.ready.items():
                if process in self.processes:
                    effects.append(Send(process, ObjectsReady(values)))
            self.ready = {}
        if self._streams:
            for entry, process, transfer in self._streams:
                self._transfers.stream(entry, process, transfer, effects)
            self._streams.clear()

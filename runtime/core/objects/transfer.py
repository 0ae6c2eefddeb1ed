"""Bringing objects from other nodes: found through the object table, pulled into the arena, several requests at once.

A pull goes through the stages of the paper's figure 7b: ask the control store where the object is (it calls back when
the object exists), reserve room, open a window for the bytes, ask a holder. If that holder no longer has it, the next
one is asked, then the control store again. However many wait for an object, it is one transfer.
"""

from random import Random

from trio_ray.runtime.core.effects import AnyEffect, CloseWindow, OpenWindow, Send, SendBytes
from trio_ray.runtime.core.ids import shard_of
from trio_ray.runtime.core.messages import (
    Address,
    LocateObjects,
    Location,
    PulledInline,
    PullFailed,
    PullObject,
    Value,
    Where,
    control_address,
)
from trio_ray.runtime.core.objects.table import ObjectEntry, ObjectTable, State


class Pull:
    """One object on its way here."""

    __slots__ = ("entry", "offset", "source", "started_at", "transfer", "untried")

    def __init__(self, entry: ObjectEntry) -> None:
        self.entry = entry
        self.transfer = 0
        """0 while it is being located."""
        self.source: Address = ""
        self.untried: list[Address] = []
        self.offset = -1
        self.started_at = 0.0


class Transfers:
    """Objects coming to and leaving this node."""

    def __init__(self, node: Address, table: ObjectTable, shards: int, rng: Random) -> None:
        self._node = node
        self._table = table
        self._shards = shards
        self._rng = rng
        self._pulls: dict[bytes, Pull] = {}
        self._by_transfer: dict[int, Pull] = {}
        self._sending: dict[tuple[int, Address], ObjectEntry] = {}
        self._transfers = 0
        self._locate: list[bytes] = []
        self.full: list[ObjectEntry] = []
        """Wanted objects for which the arena had no room; the node turns them into errors for those who wait."""
        self.lost: list[ObjectEntry] = []
        """Wanted objects of which no copy is left anywhere."""
        self.bandwidth = 0.0
        """Bytes per second into this node, exponentially averaged (paper, section 4.2.2); 0 while unknown."""
        self.bytes_received = 0

    def fetch(self, entry: ObjectEntry, now: float, effects: list[AnyEffect]) -> None:
        """See to it that the object, which is not here, comes here (once it exists)."""
        if entry.object_id in self._pulls:
            return
        pull = self._pulls[entry.object_id] = Pull(entry)
        if entry.state == State.ELSEWHERE and entry.nodes:
            self._begin(pull, entry.nodes, now, effects)
        else:
            self._locate.append(entry.object_id)

    def forget(self, entry: ObjectEntry) -> None:
        """The object came to be here by other means; a pull that is only locating it ends."""
        pull = self._pulls.get(entry.object_id)
        if pull is not None and not pull.transfer:
            del self._pulls[entry.object_id]

    def located(self, location: Location, now: float, effects: list[AnyEffect]) -> None:
        """The control store says where an object is."""
        entry = self._table.entries.get(location.object_id)
        if entry is None:
            self._pulls.pop(location.object_id, None)
            return
        if not location.nodes:
            self._pulls.pop(location.object_id, None)
            if entry.waiters:
                self.lost.append(entry)
            return
        others = tuple(node for node in location.nodes if node != self._node)
        self._table.exists_at(entry, location.size, others)
        pull = self._pulls.get(location.object_id)
        if pull is not None and not pull.transfer and not entry.local and others:
            self._begin(pull, others, now, effects)

    def _begin(self, pull: Pull, nodes: tuple[Address, ...], now: float, effects: list[AnyEffect]) -> None:
        pull.untried = list(nodes)
        self._rng.shuffle(pull.untried)  # readers of one popular object spread over its copies
        self._ask_next(pull, now, effects)

    def _ask_next(self, pull: Pull, now: float, effects: list[AnyEffect]) -> None:
        entry = pull.entry
        if pull.offset < 0:
            offset = self._table.allocate(entry.size)
            if offset is None:
                del self._pulls[entry.object_id]
                self.full.append(entry)
                return
            pull.offset = offset
        if not pull.untried:
            self._release(pull)
            entry.state, entry.nodes = State.PENDING, ()
            pull.transfer, pull.source = 0, ""
            self._locate.append(entry.object_id)
            return
        pull.source = pull.untried.pop()
        self._transfers += 1
        pull.transfer, pull.started_at = self._transfers, now
        self._by_transfer[pull.transfer] = pull
        effects.append(OpenWindow(pull.source, pull.transfer, pull.offset, entry.size))
        effects.append(Send(pull.source, PullObject(entry.object_id, pull.transfer)))

    def _release(self, pull: Pull) -> None:
        self._by_transfer.pop(pull.transfer, None)
        if pull.offset >= 0:
            self._table.arena.free(pull.offset)
            pull.offset = -1

    def filled(self, transfer: int, now: float) -> None:
        """All bytes of a transfer have arrived."""
        pull = self._by_transfer.pop(transfer, None)
        if pull is None:
            return
        entry = pull.entry
        del self._pulls[entry.object_id]
        if entry.local:
            self._table.arena.free(pull.offset)
            return
        elapsed = now - pull.started_at
        self.bytes_received += entry.size
        if elapsed > 0:
            rate = entry.size / elapsed
            self.bandwidth = rate if not self.bandwidth else 0.8 * self.bandwidth + 0.2 * rate
        entry.offset = pull.offset
        self._table.seal(entry, State.SHARED, size=entry.size, primary=False)

    def pulled_inline(self, message: PulledInline, effects: list[AnyEffect]) -> None:
        """The object was small enough to come by value."""
        pull = self._by_transfer.get(message.transfer)
        if pull is None:
            return
        effects.append(CloseWindow(pull.transfer))
        self._release(pull)
        del self._pulls[pull.entry.object_id]
        value = message.value
        self._table.seal(
            pull.entry, State.INLINE, payload=value.payload, size=value.size, error=value.error, primary=False
        )

    def failed(self, transfer: int, now: float, effects: list[AnyEffect]) -> None:
        """The node asked does not have the object (any more)."""
        pull = self._by_transfer.pop(transfer, None)
        if pull is not None:
            effects.append(CloseWindow(transfer))
            self._ask_next(pull, now, effects)

    def peer_lost(self, peer: Address, now: float, effects: list[AnyEffect]) -> None:
        """Ask someone else for what the lost node was sending; stop counting what was being sent to it."""
        for pull in list(self._by_transfer.values()):
            if pull.source == peer:
                self.failed(pull.transfer, now, effects)
        for transfer, to in [key for key in self._sending if key[1] == peer]:
            self.sent(transfer, to)

    def serve(self, source: Address, message: PullObject, effects: list[AnyEffect]) -> None:
        """Another node asks for an object."""
        entry = self._table.entries.get(message.object_id)
        if entry is None or not entry.local or entry.doomed:
            effects.append(Send(source, PullFailed(message.transfer, message.object_id)))
            return
        for object_id in entry.contained:
            self._table.export(self._table.know(object_id))
        if entry.state == State.INLINE:
            value = Value(entry.object_id, Where.INLINE, entry.payload, 0, entry.size, entry.error)
            effects.append(Send(source, PulledInline(message.transfer, value)))
            return
        self.stream(entry, source, message.transfer, effects)

    def stream(self, entry: ObjectEntry, to: Address, transfer: int, effects: list[AnyEffect]) -> None:
        """Send the bytes of an object in the arena, which stays in use until they have left."""
        entry.uses += 1
        self._sending[transfer, to] = entry
        effects.append(SendBytes(to, transfer, entry.offset, entry.size))

    def new_transfer(self) -> int:
        """A number for a stream that this node begins, or expects from one of its processes."""
        self._transfers += 1
        return self._transfers

    def sent(self, transfer: int, to: Address) -> None:
        """The bytes have left (or never will)."""
        entry = self._sending.pop((transfer, to), None)
        if entry is not None:
            self._table.unuse(entry)

    def flush(self, effects: list[AnyEffect]) -> None:
        """Ask for the locations that this step found wanting."""
        if not self._locate:
            return
        split: dict[int, list[bytes]] = {}
        for object_id in self._locate:
            split.setdefault(shard_of(object_id, self._shards), []).append(object_id)
        self._locate = []
        for shard, object_ids in split.items():
            effects.append(Send(control_address(shard), LocateObjects(object_ids)))

    def validate(self) -> None:
        """Assert the transfers' invariants."""
        for object_id, pull in self._pulls.items():
            assert pull.entry.object_id == object_id
            assert not pull.transfer or self._by_transfer.get(pull.transfer) is pull
        for entry in self._sending.values():
            assert entry.uses > 0

"""What a node knows of objects: which exist, where their bytes are, and who keeps them alive.

Three counts guard an entry. ``holders`` are this node's processes with a reference; ``pins`` are unfinished tasks
submitted here that take it and objects here that contain it; both mean "this node holds the object", and the control
store is told when an *exported* object's hold begins or ends. ``uses`` and the processes' read pins only keep the
bytes in place.

An object is exported once another node may know its id: it is an input of a task that left the node, it is contained
in a value that did, its task came from elsewhere, or it has lived long enough to be written behind to the control
store. An object that was never exported is freed the moment its last holder lets go, and the control store never
hears of it: most results of short tasks live and die so.
"""

from collections.abc import Callable, Iterable
from enum import IntEnum

import msgspec

from trio_ray.runtime.core.messages import Address, ObjectUpdate, Value, Where
from trio_ray.runtime.core.objects.arena import Arena
from trio_ray.runtime.core.objects.references import HoldLedger

Waiter = Callable[["ObjectEntry"], None]
"""Called once, when the object is here, or known to be an error."""


class State(IntEnum):
    """Where the object is, seen from this node."""

    PENDING = 0
    """Not known to exist yet."""
    INLINE = 1
    SHARED = 2
    """In this node's arena, sealed."""
    UNSEALED = 3
    """In this node's arena, being written by a process or a transfer."""
    ELSEWHERE = 4
    GONE = 5
    """Forgotten: nobody referred to it any more."""


PENDING, INLINE, SHARED, UNSEALED, ELSEWHERE, GONE = State
# Looking one up in the class takes 70 ns in Python 3.11, which counts where it is done for every task.


class ObjectEntry(msgspec.Struct, gc=False, eq=False):
    """One object. The hot path reads and writes its fields directly.

    A struct only because C code fills it in: a node makes one of these, and one ``TaskEntry``, for every task.
    """

    object_id: bytes
    holders: tuple[Address, ...] = ()
    exported: bool = False
    state: State = PENDING
    pins: int = 0
    uses: int = 0
    size: int = 0
    offset: int = -1
    payload: bytes = b""
    error: bool = False
    primary: bool = False
    """Made here, so never evicted."""
    held: bool = False
    """Counted as this node's hold by the control store."""
    doomed: bool = False
    """Freed by the control store; waits for its last use to end."""
    logged: int = 0
    """Return values of its task, if that task's lineage is in the task table; else 0."""
    contained: tuple[bytes, ...] = ()
    nodes: tuple[Address, ...] = ()
    waiters: list[Waiter] | None = None
    on_free: Waiter | None = None
    """Called when the object is gone; the life of an actor is tied to the result of its creation."""

    @property
    def local(self) -> bool:
        """Whether this node can hand its bytes to a process now."""
        state = self.state
        return state is INLINE or state is SHARED


class ObjectTable:
    """All objects a node knows, and its arena."""

    def __init__(self, arena_size: int, ledger: HoldLedger) -> None:
        self.entries: dict[bytes, ObjectEntry] = {}
        self.arena = Arena(arena_size)
        self.ledger = ledger
        self.updates: list[ObjectUpdate] = []
        """Location changes to report to the control store in this step."""
        self.unreported: list[ObjectEntry] = []
        """Sealed here and not exported; written behind if they live on."""
        self.dropped: list[ObjectEntry] = []
        """Gone, and made by a task whose lineage is logged."""
        self._replicas: dict[bytes, ObjectEntry] = {}
        """Evictable copies, least recently used first."""
        self._readers: dict[Address, dict[bytes, int]] = {}
        """Read pins by process."""
        self._unsealed: dict[Address, dict[bytes, ObjectEntry]] = {}
        """What each process is writing."""
        self._solo: dict[Address, tuple[Address, ...]] = {}
        self._unneeded: list[ObjectEntry] = []
        """Being discarded."""
        self.expected: Callable[[bytes], bool] = lambda object_id: False
        """Whether an object will be made by an unfinished task that this node owns."""

    # -- holding -----------------------------------------------------------------------------------------------

    def expect(self, object_id: bytes, process: Address) -> ObjectEntry:
        """An object that a task submitted by ``process`` will make; the process holds it from the start."""
        entry = self.entries.get(object_id)
        if entry is None:
            entry = self.entries[object_id] = ObjectEntry(object_id, self.solo(process))
        else:
            self.hold(entry, process)
            if entry.exported:  # it was referred to before its maker was submitted
                self.ledger.claim(object_id)
        return entry

    def solo(self, process: Address) -> tuple[Address, ...]:
        """The holders of an object that only ``process`` holds: one tuple for all of those."""
        solo = self._solo.get(process)
        if solo is None:
            solo = self._solo[process] = (process,)
        return solo

    def know(self, object_id: bytes) -> ObjectEntry:
        """The entry of an object that something here refers to; one unknown until now was born elsewhere."""
        entry = self.entries.get(object_id)
        if entry is None:
            entry = self.entries[object_id] = ObjectEntry(object_id, exported=True)
        return entry

    def hold(self, entry: ObjectEntry, process: Address) -> None:
        """``process`` has a reference."""
        if process not in entry.holders:
            entry.holders = (*entry.holders, process)
            self._gained(entry)

    def unhold(self, entry: ObjectEntry, process: Address) -> None:
        """``process`` dropped its last reference."""
        holders = entry.holders
        if process in holders:
            entry.holders = () if len(holders) == 1 else tuple(other for other in holders if other != process)
            if not entry.holders and not entry.pins:
                self._lost(entry)

    def unhold_all(self, object_ids: Iterable[bytes], process: Address) -> None:
        """``process`` dropped its last references to these."""
        entries, solo = self.entries, self.solo(process)
        for object_id in object_ids:
            entry = entries.get(object_id)
            if entry is None:
                continue
            if (
                entry.holders is solo and entry.state is INLINE
                and not (entry.exported or entry.pins or entry.uses or entry.contained or entry.waiters
                         or entry.logged or entry.on_free)
            ):  # ``unhold`` in one go, for the most common case: a small result that only its submitter knew
                entry.holders, entry.state = (), GONE
                del entries[object_id]
            else:
                self.unhold(entry, process)

    def pin(self, entry: ObjectEntry) -> None:
        """An unfinished task submitted here, or an object here, refers to it."""
        entry.pins += 1
        self._gained(entry)

    def unpin(self, entry: ObjectEntry) -> None:
        """The end of one ``pin``."""
        entry.pins -= 1
        if not entry.pins and not entry.holders:
            self._lost(entry)

    def _gained(self, entry: ObjectEntry) -> None:
        if entry.exported and not entry.held:
            entry.held = True
            self.ledger.add(entry.object_id)

    def _lost(self, entry: ObjectEntry) -> None:
        if entry.held:
            entry.held = False
            self.ledger.remove(entry.object_id)
        if entry.exported and entry.state == PENDING and self.expected(entry.object_id):
            return  # others may hold it: when it is made, the control store says whether anybody does
        if not entry.exported or entry.state in (PENDING, ELSEWHERE):
            self.discard_when_unused(entry)

    def export(self, entry: ObjectEntry) -> None:
        """Another node may know the object from now on, and what it contains."""
        found = [entry]
        for entry in found:  # which grows: objects contain each other as deep as a program likes
            if entry.exported:
                continue
            entry.exported = True
            if entry.holders or entry.pins:
                entry.held = True
                self.ledger.add(entry.object_id)
                self.ledger.claim(entry.object_id)
            if entry.local:
                self.updates.append(ObjectUpdate(entry.object_id, entry.size, entry.contained))
            if entry.contained:
                found += map(self.know, entry.contained)

    # -- making ------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> int | None:
        """Room in the arena, evicting replicas if need be; None if there is none."""
        offset = self.arena.allocate(size)
        while offset is None:
            victim = next((e for e in self._replicas.values() if not self._in_use(e)), None)
            if victim is None:
                return None
            self._evict(victim)
            offset = self.arena.allocate(size)
        return offset

    def create(self, object_id: bytes, size: int, process: Address, *, held: bool) -> ObjectEntry | None:
        """Room for an object that ``process`` will write (and holds, if it is a put); None if there is none."""
        offset = self.allocate(size)
        if offset is None:
            return None
        if held:
            entry = self.expect(object_id, process)
        else:
            entry = self.entries.setdefault(object_id, ObjectEntry(object_id))
        if entry.offset >= 0 or entry.local:  # made again by a re-executed task: the first copy stands
            self.arena.free(offset)
            return entry
        entry.offset, entry.size, entry.state = offset, size, UNSEALED
        self._unsealed.setdefault(process, {})[object_id] = entry
        return entry

    def unsealed_by(self, process: Address, object_id: bytes) -> ObjectEntry | None:
        """The entry that ``process`` created and has not sealed; it is taken off the list of those."""
        return self._unsealed.get(process, {}).pop(object_id, None)

    def abort(self, entry: ObjectEntry) -> None:
        """An unsealed object will not be written; the entry goes back to pending."""
        self.arena.free(entry.offset)
        entry.offset, entry.size, entry.state = -1, 0, PENDING
        if not entry.holders and not entry.pins:
            self._lost(entry)

    def seal(
        self, entry: ObjectEntry, state: State, *, payload: bytes = b"", size: int = 0, error: bool = False,
        contained: tuple[bytes, ...] = (), primary: bool = True,
    ) -> None:  # fmt: skip
        """The object exists here from now on. A second copy of an object that does already is ignored."""
        if entry.local:
            return
        entry.state, entry.payload, entry.size, entry.error, entry.primary = state, payload, size, error, primary
        if contained:
            entry.contained = contained
            for object_id in contained:
                self.pin(self.know(object_id))
        if not primary and state == SHARED:
            self._replicas[entry.object_id] = entry
        if entry.exported:
            self.updates.append(ObjectUpdate(entry.object_id, size, contained))
            for object_id in contained:
                self.export(self.know(object_id))
        else:
            self.unreported.append(entry)
        waiters, entry.waiters = entry.waiters, None
        if waiters:
            for waiter in waiters:
                waiter(entry)
        if not entry.holders and not entry.pins and not entry.exported:
            self.discard_when_unused(entry)

    def exists_at(self, entry: ObjectEntry, size: int, nodes: tuple[Address, ...]) -> None:
        """The object is on other nodes."""
        if entry.state == PENDING or entry.state == ELSEWHERE:
            entry.state, entry.size, entry.nodes = ELSEWHERE, size, nodes

    # -- reading -----------------------------------------------------------------------------------------------

    def value(self, entry: ObjectEntry, process: Address) -> Value:
        """How ``process`` reads the object, which is local; a shared one is pinned for it."""
        if entry.state == INLINE:
            return Value(entry.object_id, Where.INLINE, entry.payload, 0, entry.size, entry.error)
        pins = self._readers.setdefault(process, {})
        pins[entry.object_id] = pins.get(entry.object_id, 0) + 1
        entry.uses += 1
        if entry.object_id in self._replicas:  # most recently used last
            self._replicas[entry.object_id] = self._replicas.pop(entry.object_id)
        return Value(entry.object_id, Where.SHARED, b"", entry.offset, entry.size)

    def unread(self, object_id: bytes, process: Address) -> None:
        """The end of one read pin of ``process``; a pin it does not have is ignored."""
        pins = self._readers.get(process)
        count = pins.get(object_id, 0) if pins else 0
        if not pins or not count:
            return
        if count == 1:
            del pins[object_id]
        else:
            pins[object_id] = count - 1
        self.unuse(self.entries[object_id])

    def unuse(self, entry: ObjectEntry) -> None:
        """The end of one use of the bytes."""
        entry.uses -= 1
        if entry.uses:
            return
        if entry.doomed:
            self.discard_when_unused(entry)
        elif not entry.holders and not entry.pins:
            self._lost(entry)

    # -- ending ------------------------------------------------------------------------------------------------

    def freed(self, object_id: bytes) -> None:
        """The control store says that nobody refers to the object any more."""
        entry = self.entries.get(object_id)
        if entry is None:
            return
        if entry.holders or entry.pins:
            # A reference came to life here after our last removal was counted, or the object was made here once more
            # after all had been lost elsewhere. Say so again, and that there is a copy: its report was a stray's.
            if not entry.held:
                self._gained(entry)
            if entry.exported and entry.local:
                self.updates.append(ObjectUpdate(object_id, entry.size, entry.contained))
            return
        entry.doomed = True
        self.discard_when_unused(entry)

    def discard_when_unused(self, entry: ObjectEntry) -> None:
        """Forget the object now, or when its bytes are no longer in use; and what nobody else refers to in it."""
        self._unneeded.append(entry)
        if len(self._unneeded) == 1:  # else it is within the loop below: they contain each other as deep as may be
            for entry in self._unneeded:
                self._discard(entry)
            self._unneeded = []

    def _discard(self, entry: ObjectEntry) -> None:
        if entry.uses or entry.waiters or entry.state == UNSEALED:
            return
        if self.entries.pop(entry.object_id, None) is None:
            return
        if entry.offset >= 0:
            self.arena.free(entry.offset)
            entry.offset = -1
        self._replicas.pop(entry.object_id, None)
        if entry.logged:
            self.dropped.append(entry)
        if entry.on_free is not None:
            entry.on_free(entry)
        entry.state = GONE
        contained, entry.contained = entry.contained, ()
        for object_id in contained:
            inner = self.entries.get(object_id)
            if inner is not None:
                self.unpin(inner)

    def process_lost(self, process: Address) -> None:
        """Drop all that a process held, read and was writing. A pass over all objects: processes die rarely."""
        for entry in list(self._unsealed.pop(process, {}).values()):
            self.abort(entry)
        for object_id, count in self._readers.pop(process, {}).items():
            for _ in range(count):
                entry_read = self.entries.get(object_id)
                if entry_read is not None:
                    self.unuse(entry_read)
        for entry in [e for e in self.entries.values() if process in e.holders]:
            self.unhold(entry, process)
        self._solo.pop(process, None)

    def _in_use(self, entry: ObjectEntry) -> bool:
        return entry.uses > 0 or bool(entry.waiters)

    def _evict(self, entry: ObjectEntry) -> None:
        self.arena.free(entry.offset)
        del self._replicas[entry.object_id]
        entry.offset, entry.state, entry.payload = -1, ELSEWHERE, b""
        self.updates.append(ObjectUpdate(entry.object_id, -1))
        if not entry.holders and not entry.pins:
            self.discard_when_unused(entry)

    def describe_full(self, size: int) -> str:
        """The sentence for a put that does not fit."""
        return (
            f"the object store has no room for {size:,} bytes: {self.arena.used:,} of {self.arena.size:,} are used by "
            f"{sum(1 for e in self.entries.values() if e.offset >= 0):,} objects that are still referred to or read; "
            "drop references to large objects, or start the node with a larger object_store_memory"
        )

    def validate(self) -> None:
        """Assert the table's invariants."""
        self.arena.validate()
        reads: dict[bytes, int] = {}
        for pins in self._readers.values():
            for object_id, count in pins.items():
                reads[object_id] = reads.get(object_id, 0) + count
        for object_id, entry in self.entries.items():
            assert entry.object_id == object_id
            assert entry.pins >= 0 and entry.uses >= reads.get(object_id, 0)
            assert (entry.offset >= 0) == (entry.state in (SHARED, UNSEALED)), entry.state
            assert not entry.held or (entry.exported and (entry.holders or entry.pins)), "held for nobody"
            assert not entry.exported or entry.held or not (entry.holders or entry.pins), "exported and not held"
            if not entry.exported and not entry.holders and not entry.pins:
                assert entry.uses or entry.waiters or entry.state == UNSEALED, "nobody needs it"
        for object_id in reads:
            assert object_id in self.entries, "a read pin of a forgotten object"
        assert set(self._replicas) <= set(self.entries)
        assert not self._unneeded, "objects were not discarded"

"""The tables of one control-store shard (paper, section 4.2.1), keyed by id.

They decide what a row becomes; whom to tell is the store's business. Hot paths store whole batches into dicts.

**When an object may go.** Each node counts its processes' references and tells the object table of the first and the
last, with a sign. Holds of different nodes arrive in any order, so that a sum of zero alone proves nothing: the second
holder may have come and gone before the first one's message is here. What proves it is that the *owner's* hold, whose
node made the object known to others in the first place, has been counted as well (``HoldObjects.born``); from then on,
a hold is only ever passed on by a holder that is counted and stays so until the new one is acknowledged. So an object
is freed when it was born, and no node's count is other than zero.

**Afterwards.** A copy may be reported after its object was freed, by a node that fetched it at the end of its life. A
bounded memory of freed objects tells such strays, which are freed at once, from new objects.
"""

from collections import deque
from collections.abc import Container, Iterable

import msgspec

from trio_ray.runtime.core.messages import (
    ActorInfo,
    ActorState,
    Address,
    Function,
    Location,
    NodeInfo,
    ObjectUpdate,
    PackedEvents,
    TaskEvent,
    TaskRecord,
)
from trio_ray.runtime.core.spec import TaskTemplate


class ObjectRow(msgspec.Struct, gc=False):
    """One object. Mutable: the hot path reads and writes its fields directly."""

    size: int
    """In bytes; -1 while no copy was reported."""
    nodes: tuple[Address, ...]
    """Those that have a copy, in the order in which they reported it."""
    holds: dict[Address, int] | None = None
    """Signed counts by node; none is zero. Replaced, never changed: the rows that one node holds once share one."""
    born: bool = False
    """The owner's hold was counted."""
    owner: Address = ""
    """The node that told so: while no copy was reported, it is to make the object."""


class ObjectTable:
    """Where each object is and who holds it."""

    def __init__(self, freed_remembered: int) -> None:
        self.rows: dict[bytes, ObjectRow] = {}
        self._freed: set[bytes] = set()
        self._freed_before: set[bytes] = set()
        """Objects freed of late, in two generations; never iterated."""
        self._freed_remembered = freed_remembered
        self._solo: dict[Address, tuple[Address]] = {}
        self._once: dict[Address, dict[Address, int]] = {}

    def changed(self, node: Address, updates: list[ObjectUpdate], strays: list[bytes]) -> None:
        """Copies that ``node`` has or dropped; those of objects freed before are added to ``strays``."""
        rows, freed, freed_before = self.rows, self._freed, self._freed_before
        solo = self._solo.get(node)
        if solo is None:
            solo = self._solo[node] = (node,)
        for update in updates:
            object_id = update.object_id
            size = update.size
            row = rows.get(object_id)
            if size < 0:
                if row is not None:
                    self._dropped(object_id, row, node)
            elif row is None:
                if object_id in freed or object_id in freed_before:
                    strays.append(object_id)
                else:
                    rows[object_id] = ObjectRow(size, solo)
            else:
                row.size = size
                nodes = row.nodes
                if not nodes:
                    row.nodes = solo
                elif node not in nodes:
                    row.nodes = (*nodes, node)

    def _dropped(self, object_id: bytes, row: ObjectRow, node: Address) -> None:
        row.nodes = tuple(other for other in row.nodes if other != node)
        if not row.nodes and not row.born and not row.holds:
            del self.rows[object_id]

    def hold(self, node: Address, added: Iterable[bytes], check: list[bytes]) -> None:
        """``node`` now holds these; those that nobody seems to hold are added to ``check``."""
        rows = self.rows
        once = self._once.get(node)
        if once is None:
            once = self._once[node] = {node: 1}
        for object_id in added:
            row = rows.get(object_id)
            if row is None:
                row = rows[object_id] = ObjectRow(-1, ())
                if object_id in self._freed or object_id in self._freed_before:
                    self._freed.discard(object_id)
                    self._freed_before.discard(object_id)
                    row.born = True
            if row.holds:
                self._count(object_id, row, node, 1, check)
            else:
                row.holds = once

    def _count(self, object_id: bytes, row: ObjectRow, node: Address, change: int, check: list[bytes]) -> None:
        holds = dict(row.holds or ())
        count = holds.pop(node, 0) + change
        if count:
            holds[node] = count
        row.holds = holds
        if not holds:
            check.append(object_id)

    def claim(self, owner: Address, owned: Iterable[bytes], check: list[bytes]) -> None:
        """``owner`` (empty: nobody will) has told of these; those that nobody holds are added to ``check``."""
        rows = self.rows
        for object_id in owned:
            row = rows.get(object_id)
            if row is None:
                continue
            row.owner = owner or row.owner
            if not row.born:
                row.born = True
                if not row.holds:
                    check.append(object_id)

    def unowned(self, object_ids: Iterable[bytes]) -> list[bytes]:
        """Those of these that nobody made and whose owner never told of them; from now on they count as lost."""
        found = []
        for object_id in object_ids:
            row = self.rows.get(object_id)
            if row is not None and not row.born and row.size < 0:
                row.size = 0
                found.append(object_id)
        return found

    def unhold(self, node: Address, removed: Iterable[bytes], check: list[bytes]) -> None:
        """``node`` no longer holds these; those that nobody seems to hold are added to ``check``."""
        rows, once = self.rows, self._once.get(node)
        for object_id in removed:
            row = rows.get(object_id)
            if row is None:
                continue
            if row.holds is once and once is not None:
                row.holds = None
                check.append(object_id)
            else:
                self._count(object_id, row, node, -1, check)

    def free(self, object_id: bytes) -> tuple[Address, ...] | None:
        """Forget the object if nobody can refer to it any more; answers with the nodes that have copies of it."""
        row = self.rows.get(object_id)
        if row is None or not row.born or row.holds:
            return None
        del self.rows[object_id]
        self._freed.add(object_id)
        if len(self._freed) >= self._freed_remembered:
            self._freed, self._freed_before = set(), self._freed
        return row.nodes

    def location(self, object_id: bytes) -> Location | None:
        """Where the object is; None while it does not exist."""
        row = self.rows.get(object_id)
        if row is None or row.size < 0:
            return None
        return Location(object_id, row.size, row.nodes)

    def node_died(self, node: Address) -> tuple[list[bytes], list[bytes], list[bytes]]:
        """Forget a node's copies and holds.

        Answers with objects whose last copy this was, or that it was still to make; with those that it was the last to
        hold; and with those whose owner has not told of them, and never will if the dead node was it.
        """
        lost: list[bytes] = []
        check: list[bytes] = []
        unborn: list[bytes] = []
        for object_id, row in self.rows.items():
            if node in row.nodes:
                row.nodes = tuple(other for other in row.nodes if other != node)
                if not row.nodes:
                    lost.append(object_id)
            elif row.size < 0 and row.owner == node:
                row.size = 0
                lost.append(object_id)
            if row.holds and node in row.holds:
                self._count(object_id, row, node, -row.holds[node], check)
            if not row.born:
                unborn.append(object_id)
        self._solo.pop(node, None)
        self._once.pop(node, None)
        return lost, check, unborn

    def validate(self, orphans: Container[bytes] = ()) -> None:
        """Assert the table's invariants; of ``orphans`` only the memory is kept that their last copy died."""
        for object_id, row in self.rows.items():
            assert row.holds is None or all(row.holds.values()), "a count of zero was kept"
            assert not row.born or row.holds, "an object that nobody holds was not freed"
            tells = row.nodes or row.born or row.holds or row.size < 0 or object_id in orphans
            assert tells, "a row that tells nothing was kept"
            assert object_id not in self._freed and object_id not in self._freed_before, "both here and freed"
            assert len(set(row.nodes)) == len(row.nodes)
        assert len(self._freed) < self._freed_remembered


class TaskTable:
    """The lineage: every task whose results may have to be made again."""

    def __init__(self) -> None:
        self.records: dict[bytes, TaskRecord] = {}
        self.templates: dict[bytes, TaskTemplate] = {}

    def log(self, records: list[TaskRecord], templates: list[TaskTemplate]) -> None:
        """New or changed rows."""
        rows = self.records
        for record in records:
            rows[record.spec.task_id] = record
        for template in templates:
            self.templates[template.template_id] = template

    def forget(self, task_ids: list[bytes]) -> None:
        """Rows that can no longer be needed."""
        records = self.records
        for task_id in task_ids:
            records.pop(task_id, None)


class EventLog:
    """The newest events, kept in the batches in which they came, still encoded."""

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._batches: deque[PackedEvents] = deque()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, batches: list[PackedEvents]) -> None:
        """Add events; whole batches of the oldest go while the others are enough."""
        for batch in batches:
            self._batches.append(batch)
            self._length += batch.count
        while self._batches and self._length - self._batches[0].count >= self._kept:
            self._length -= self._batches.popleft().count

    def newest(self, count: int) -> list[TaskEvent]:
        """Up to ``count`` events, oldest first."""
        batches: list[PackedEvents] = []
        found = 0
        for batch in reversed(self._batches):
            if found >= count:
                break
            batches.append(batch)
            found += batch.count
        events = [event for batch in reversed(batches) for event in batch.unpack()]
        return events[max(0, found - count) :]

    def validate(self) -> None:
        """Assert that the length is right and the bound kept."""
        assert self._length == sum(batch.count for batch in self._batches)
        assert not self._batches or self._length - self._batches[0].count < self._kept


class FunctionTable:
    """Pickled functions and classes by content id; a row never changes."""

    def __init__(self) -> None:
        self.rows: dict[bytes, Function] = {}

    def put(self, functions: list[Function]) -> list[Function]:
        """Store rows; answers with those that are new."""
        rows = self.rows
        fresh = [function for function in functions if function.function_id not in rows]
        for function in fresh:
            rows[function.function_id] = function
        return fresh


class ActorTable:
    """The actors of this shard. A row that is dead stays dead."""

    def __init__(self) -> None:
        self.rows: dict[bytes, ActorInfo] = {}
        self._restarts: dict[bytes, int] = {}
        """How often an actor was handed to its owner to be restarted because its node died."""

    def update(self, info: ActorInfo) -> ActorInfo:
        """A node says what became of an actor; answers with the row as it now stands."""
        row = self.rows.get(info.actor_id)
        if row is not None and row.state == ActorState.DEAD:
            return row
        if info.state == ActorState.DEAD:
            info = dead(info, info.reason)
            self._restarts.pop(info.actor_id, None)
        self.rows[info.actor_id] = info
        return info

    def node_died(self, node: Address, why: str, alive: Iterable[Address]) -> list[ActorInfo]:
        """What becomes of the actors on a dead node: handed to their owner while restarts are left, or dead."""
        changed: list[ActorInfo] = []
        living = set(alive)
        for actor_id, row in self.rows.items():
            if row.state == ActorState.DEAD or (row.node or row.owner) != node:
                continue
            restarts = self._restarts.get(actor_id, 0)
            limit = row.template.max_retries if row.template is not None and row.creation is not None else 0
            if row.node and row.owner in living and (limit < 0 or restarts < limit):
                self._restarts[actor_id] = restarts + 1
                changed.append(msgspec.structs.replace(row, state=ActorState.RESTARTING, node="", reason=why))
            else:
                changed.append(dead(row, f"the actor {row.class_name} is dead: {why}"))
        for info in changed:
            self.rows[info.actor_id] = info
            if info.state == ActorState.DEAD:
                self._restarts.pop(info.actor_id, None)
        return changed

    def validate(self) -> None:
        """Assert the table's invariants."""
        for actor_id, row in self.rows.items():
            assert row.actor_id == actor_id
        for actor_id in self._restarts:
            assert self.rows[actor_id].state != ActorState.DEAD


def dead(info: ActorInfo, reason: str) -> ActorInfo:
    """The row of an actor that has died: what would restart it is dropped."""
    return ActorInfo(info.actor_id, info.name, info.class_name, ActorState.DEAD, info.node, info.owner, reason)


class NameTable:
    """Names of actors, unique while their actor lives. All of a cluster's are on shard 0."""

    def __init__(self) -> None:
        self.rows: dict[str, ActorInfo] = {}

    def update(self, info: ActorInfo) -> ActorInfo:
        """Take or give back a name; answers with ``info``, or with a dead row that says why it is refused."""
        holder = self.rows.get(info.name)
        if info.state == ActorState.DEAD:
            if holder is not None and holder.actor_id == info.actor_id:
                del self.rows[info.name]
            return info
        if holder is not None and holder.actor_id != info.actor_id:
            namespace, _, name = info.name.partition("/")
            return dead(
                info,
                f"an actor named {name!r} exists already in the namespace {namespace!r} (a {holder.class_name}); "
                f"choose another name, or use that one: get_actor({name!r})",
            )
        self.rows[info.name] = info
        return info


class NodeTable:
    """The nodes of the cluster, in the order in which they joined. Shard 0 has the original, the others copies."""

    def __init__(self) -> None:
        self.rows: dict[Address, NodeInfo] = {}

    def alive(self) -> list[Address]:
        """The nodes to publish to."""
        return [node for node, info in self.rows.items() if info.alive]

    def register(self, info: NodeInfo) -> None:
        """A node joined; one that comes back under its old address joins anew."""
        self.rows.pop(info.node, None)
        self.rows[info.node] = info

    def died(self, node: Address) -> NodeInfo | None:
        """A node is gone: its changed row, or None if it was not a member."""
        info = self.rows.get(node)
        if info is None or not info.alive:
            return None
        info = NodeInfo(info.node, info.host, info.resources, info.labels, False, info.store_bytes)
        self.rows[node] = info
        return info

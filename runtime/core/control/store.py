"""One shard of the control store: the tables, and telling those concerned when they change.

Rows are sharded by key (``ids.shard_of``). Three things are not: the node table, which shard 0 keeps and publishes to
every node, to placement and to the other shards; what is to be published to every node (cancelled scopes), which any
shard does; and the names of actors, which are unique in the whole cluster and so are all kept by shard 0. An actor's
row lives on the shard of its id; if it has a name, that shard first asks shard 0 by passing ``UpdateActors`` on, and
takes the row that comes back, which is dead if the name is taken.

Who is told what, once a step and in one message each: a node that asked for an object, when it exists (the callback of
the paper's figure 7b); a node that asked for a function; those who watch an actor, whenever its row changes; the nodes
that have copies of an object that nobody refers to any more.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from trio_ray.runtime.core.control.pubsub import Outbox, Subscriptions
from trio_ray.runtime.core.control.queries import Queries
from trio_ray.runtime.core.control.tables import (
    ActorTable,
    EventLog,
    FunctionTable,
    NameTable,
    NodeTable,
    ObjectTable,
    TaskTable,
)
from trio_ray.runtime.core.effects import AnyEffect, Send, SetTimer
from trio_ray.runtime.core.machine import AnyEvent, PeerLost, Received, TimerFired
from trio_ray.runtime.core.messages import (
    PLACEMENT,
    ActorInfo,
    ActorsChanged,
    ActorState,
    Address,
    ControlAnswer,
    ControlQuery,
    ForgetTasks,
    FreeObjects,
    Function,
    Functions,
    GetFunctions,
    HoldObjects,
    HoldsCounted,
    LocateObjects,
    Location,
    LogEvents,
    LogTasks,
    NodeInfo,
    NodesChanged,
    ObjectsChanged,
    ObjectsLocated,
    PublishCancel,
    PutFunctions,
    RegisterNode,
    UpdateActors,
    WatchActors,
    control_address,
)

ORPHANS = "orphans:"
"""Prefix of the timer keys that end the wait for the owners of objects after a node's death."""


class ControlMachine:
    """Every decision of one shard."""

    def __init__(
        self, shard: int, shards: int, *, events_kept: int = 100_000, freed_remembered: int = 50_000,
        orphan_grace_s: float = 10.0,
    ) -> None:  # fmt: skip
        self.address = control_address(shard)
        self._others = [control_address(other) for other in range(shards) if other != shard]
        self._keeps_names = shard == 0
        self._orphan_grace_s = orphan_grace_s
        self.objects = ObjectTable(freed_remembered)
        self.tasks = TaskTable()
        self.events = EventLog(events_kept)
        self.functions = FunctionTable()
        self.actors = ActorTable()
        self.names = NameTable()
        self.nodes = NodeTable()
        self._dead: dict[Address, None] = {}
        """Nodes that died: what they still say is not heard."""
        self._locating = Subscriptions()
        self._fetching = Subscriptions()
        self._watching = Subscriptions()
        self._located: Outbox[Location] = Outbox()
        self._fetched: Outbox[Function] = Outbox()
        self._watched: Outbox[ActorInfo] = Outbox()
        self._free: Outbox[bytes] = Outbox()
        self._check: list[bytes] = []
        """Objects that may have lost their last holder in this step."""
        self._orphans: dict[str, list[bytes]] = {}
        """By timer key: objects whose owner may be dead."""
        self._deaths = 0
        self._joined: dict[Address, NodeInfo] = {}
        """Nodes that registered in this step."""
        self._queries = Queries(
            self.address, self._others, self.nodes, self.objects, self.tasks, self.events, self.actors, self.names
        )
        self._now = 0.0
        self._effects: list[AnyEffect] = []
        self._on_message: dict[type, Callable[[Address, Any], None]] = {
            ObjectsChanged: self._objects_changed,
            LocateObjects: self._locate,
            HoldObjects: self._hold,
            LogTasks: self._log_tasks,
            ForgetTasks: self._forget_tasks,
            LogEvents: self._log_events,
            PutFunctions: self._put_functions,
            GetFunctions: self._get_functions,
            UpdateActors: self._update_actors,
            WatchActors: self._watch_actors,
            RegisterNode: self._register,
            NodesChanged: self._nodes_changed,
            PublishCancel: self._publish_cancel,
            ControlQuery: self._query,
            ControlAnswer: self._answer,
        }

    # -- the contract ------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[AnyEffect]:
        """Nothing to do: the nodes come to the store."""
        return []

    def step(self, events: Sequence[AnyEvent], now: float) -> list[AnyEffect]:
        """Take in what happened, answer with what to do."""
        effects: list[AnyEffect] = []
        self._effects = effects
        self._now = now
        on_message, dead = self._on_message, self._dead
        for event in events:
            if type(event) is Received:
                message = event.message
                if not dead or event.source not in dead or type(message) is RegisterNode:
                    on_message[type(message)](event.source, message)
            elif type(event) is PeerLost:
                self._node_died(event.peer, event.reason)
            elif type(event) is TimerFired:
                self._orphaned(event.key)
        if self._joined:
            self._announce_joined()
        if self._check:
            self._free_unheld()
        for to, locations in self._located.drain():
            effects.append(Send(to, ObjectsLocated(locations)))
        for to, functions in self._fetched.drain():
            effects.append(Send(to, Functions(functions)))
        for to, actors in self._watched.drain():
            effects.append(Send(to, ActorsChanged(actors)))
        for to, object_ids in self._free.drain():
            effects.append(Send(to, FreeObjects(object_ids)))
        self._effects = []
        return effects

    # -- objects -----------------------------------------------------------------------------------------------

    def _objects_changed(self, source: Address, message: ObjectsChanged) -> None:
        strays: list[bytes] = []
        self.objects.changed(source, message.updates, strays)
        for object_id in strays:
            self._free.add(source, object_id)
        if self._locating:
            locating = self._locating
            for update in message.updates:
                if update.size >= 0 and update.object_id in locating:
                    location = self.objects.location(update.object_id)
                    if location is not None:
                        self._located.add_all(locating.take(update.object_id), location)

    def _locate(self, source: Address, message: LocateObjects) -> None:
        for object_id in message.object_ids:
            location = self.objects.location(object_id)
            if location is not None:
                self._located.add(source, location)
            if location is None or not location.nodes:
                self._locating.add(object_id, source)

    def _hold(self, source: Address, message: HoldObjects) -> None:
        objects, check = self.objects, self._check
        if message.added:
            objects.hold(source, message.added, check)
        if message.born:
            objects.claim(source, message.born, check)
        if message.removed:
            objects.unhold(source, message.removed, check)
        if message.number:
            self._effects.append(Send(source, HoldsCounted(message.number)))

    def _free_unheld(self) -> None:
        check, self._check = self._check, []
        for object_id in check:
            nodes = self.objects.free(object_id)
            if nodes is not None:
                self._free.add_all(nodes, object_id)
                if self._locating:
                    self._locating.take(object_id)

    def _orphaned(self, key: str) -> None:
        """No owner will tell of these any more: they are lost, and go as soon as nobody holds them."""
        orphans = self._orphans.pop(key, [])
        self._tell_lost(self.objects.unowned(orphans))
        self.objects.claim("", orphans, self._check)

    def _tell_lost(self, object_ids: list[bytes]) -> None:
        """Tell the nodes concerned that nobody has these, nor will make them."""
        for object_id in object_ids:
            row = self.objects.rows[object_id]
            concerned = dict.fromkeys((*(row.holds or ()), *self._locating.of(object_id)))
            self._located.add_all(concerned, Location(object_id, row.size, ()))

    # -- tasks, events, functions ------------------------------------------------------------------------------

    def _log_tasks(self, source: Address, message: LogTasks) -> None:
        self.tasks.log(message.records, message.templates)

    def _forget_tasks(self, source: Address, message: ForgetTasks) -> None:
        self.tasks.forget(message.task_ids)

    def _log_events(self, source: Address, message: LogEvents) -> None:
        self.events.extend(message.batches)

    def _put_functions(self, source: Address, message: PutFunctions) -> None:
        for function in self.functions.put(message.functions):
            self._fetched.add_all(self._fetching.take(function.function_id), function)

    def _get_functions(self, source: Address, message: GetFunctions) -> None:
        for function_id in message.function_ids:
            function = self.functions.rows.get(function_id)
            if function is None:
                self._fetching.add(function_id, source)
            else:
                self._fetched.add(source, function)

    # -- actors ------------------------------------------------------------------------------------------------

    def _update_actors(self, source: Address, message: UpdateActors) -> None:
        for info in message.actors:
            if source in self._others:
                if self._keeps_names:  # the shard of the actor's id asks whether it may have its name
                    self._effects.append(Send(source, UpdateActors([self.names.update(info)])))
                else:
                    self._settle(info, refused=info.state == ActorState.DEAD)
            elif not info.name:
                self._settle(info)
            elif self._keeps_names:
                row = self.names.update(info)
                self._settle(row, refused=row is not info)
            else:
                self._effects.append(Send(control_address(0), UpdateActors([info])))

    def _settle(self, info: ActorInfo, *, refused: bool = False) -> None:
        """Store a row and tell those who watch it, and its node if the node does not know that it is dead."""
        before = self.actors.rows.get(info.actor_id)
        if before == info or info.node in self._dead:
            return
        row = self.actors.update(info)
        told = dict.fromkeys(self._watching.of(row.actor_id)) if row is not before else {}
        if row.state == ActorState.DEAD and info.node and (refused or info.state != ActorState.DEAD):
            told[info.node] = None
        self._watched.add_all(told, row)

    def _watch_actors(self, source: Address, message: WatchActors) -> None:
        for actor_id in message.actor_ids:
            self._watching.add(actor_id, source)
            row = self.actors.rows.get(actor_id)
            if row is not None:
                self._watched.add(source, row)

    # -- nodes -------------------------------------------------------------------------------------------------

    def _register(self, source: Address, message: RegisterNode) -> None:
        info = message.info
        self._dead.pop(info.node, None)
        self.nodes.register(info)
        self._joined[info.node] = info

    def _announce_joined(self) -> None:
        """One message a node however many joined together: a cluster of a thousand nodes comes up in thousands of
        messages, not a million."""
        joined, self._joined = self._joined, {}
        everything = NodesChanged(list(self.nodes.rows.values()))
        for address in joined:
            self._effects.append(Send(address, everything))
        others = [node for node in self.nodes.alive() if node not in joined]
        self._publish_nodes(NodesChanged(list(joined.values())), others)

    def _publish_nodes(self, changed: NodesChanged, nodes: list[Address]) -> None:
        for address in (*nodes, PLACEMENT, *self._others):
            self._effects.append(Send(address, changed))

    def _nodes_changed(self, source: Address, message: NodesChanged) -> None:
        """From shard 0."""
        for info in message.nodes:
            if info.alive:
                self._dead.pop(info.node, None)
                self.nodes.register(info)
            else:
                self._node_died(info.node, "")

    def _node_died(self, node: Address, reason: str) -> None:
        info = self.nodes.died(node)
        if info is None:
            return
        self._dead[node] = None
        self._joined.pop(node, None)
        for subscriptions in (self._locating, self._fetching, self._watching):
            subscriptions.drop_subscriber(node)
        alive = self.nodes.alive()
        if self._keeps_names:
            self._publish_nodes(NodesChanged([info]), alive)
        lost, check, unborn = self.objects.node_died(node)
        self._check += check
        self._tell_lost(lost)
        if unborn:
            self._deaths += 1
            key = f"{ORPHANS}{self._deaths}"
            self._orphans[key] = unborn
            self._effects.append(SetTimer(key, self._now + self._orphan_grace_s))
        why = f"its node {node} died" + (f" ({reason})" if reason else "")
        renamed: list[ActorInfo] = []
        for row in self.actors.node_died(node, why, alive):
            if row.name:
                renamed.append(row)
            told = dict.fromkeys(self._watching.of(row.actor_id))
            if row.owner in self.nodes.rows and self.nodes.rows[row.owner].alive:
                told[row.owner] = None
            self._watched.add_all(told, row)
        for row in renamed:
            if self._keeps_names:
                self.names.update(row)
            else:
                self._effects.append(Send(control_address(0), UpdateActors([row])))

    # -- the rest ----------------------------------------------------------------------------------------------

    def _publish_cancel(self, source: Address, message: PublishCancel) -> None:
        for node in self.nodes.alive():
            if node != source:
                self._effects.append(Send(node, message))

    def _query(self, source: Address, message: ControlQuery) -> None:
        self._effects += self._queries.asked(source, message)

    def _answer(self, source: Address, message: ControlAnswer) -> None:
        self._effects += self._queries.answered(source, message)

    def validate(self) -> None:
        """Assert every invariant of the shard."""
        self.objects.validate(frozenset(chain.from_iterable(self._orphans.values())))
        self.events.validate()
        self.actors.validate()
        for subscriptions in (self._locating, self._fetching, self._watching):
            subscriptions.validate()
        assert not self._check, "an object that may be free was not looked at"
        assert not (self._located or self._fetched or self._watched or self._free), "a batch was not sent"

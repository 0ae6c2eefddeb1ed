"""The control store: its tables, whom it tells what, and the one promise about objects.

That promise, never freed while anyone can refer to an object and always freed in the end, is tested with the nodes'
own tables and ledgers over links that delay and interleave as they like.
"""

from collections import deque
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from trio_ray.runtime.core import ids
from trio_ray.runtime.core.control.store import ControlMachine
from trio_ray.runtime.core.effects import AnyEffect, Send, SetTimer
from trio_ray.runtime.core.machine import PeerLost, Received, TimerFired
from trio_ray.runtime.core.messages import (
    PLACEMENT,
    ActorInfo,
    ActorsChanged,
    ActorState,
    Address,
    AnyMessage,
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
    ObjectUpdate,
    PackedEvents,
    PublishCancel,
    PutFunctions,
    RegisterNode,
    TaskEvent,
    TaskRecord,
    UpdateActors,
    WatchActors,
    control_address,
)
from trio_ray.runtime.core.objects.references import HoldLedger
from trio_ray.runtime.core.objects.table import ObjectTable, State
from trio_ray.runtime.core.spec import Kind, TaskSpec, TaskTemplate, resources

X, Y = ids.return_id(b"x" * 16, 0), ids.return_id(b"y" * 16, 0)


class Store:
    """Shards whose every step is validated; what they say to each other is delivered at once."""

    def __init__(self, nodes: int = 3, shards: int = 1, **options: Any) -> None:
        self.shards = [ControlMachine(shard, shards, **options) for shard in range(shards)]
        self.now = 0.0
        self.out: list[tuple[Address, AnyMessage]] = []
        self.timers: dict[str, float] = {}
        for shard in self.shards:
            assert shard.start(0.0) == []
        for index in range(nodes):
            self.register(index)
        self.out.clear()

    def register(self, index: int) -> None:
        self.say(f"n:{index}", RegisterNode(NodeInfo(f"n:{index}", "", resources({"CPU": 2}))))

    def say(self, source: Address, *messages: AnyMessage, shard: int = 0) -> list[tuple[Address, AnyMessage]]:
        """Answers with what nodes and placement are told because of it."""
        del self.out[:]
        self._step(shard, [Received(source, message) for message in messages])
        return self.out

    def lose(self, node: Address, reason: str = "") -> list[tuple[Address, AnyMessage]]:
        del self.out[:]
        for shard in range(len(self.shards)):
            self._step(shard, [PeerLost(node, reason)])
        return self.out

    def fire(self, key: str) -> list[tuple[Address, AnyMessage]]:
        del self.out[:]
        self._step(0, [TimerFired(key)])
        return self.out

    def _step(self, shard: int, events: list[Any]) -> None:
        machine = self.shards[shard]
        effects: list[AnyEffect] = machine.step(events, self.now)
        machine.validate()
        for effect in effects:
            if isinstance(effect, SetTimer):
                self.timers[effect.key] = effect.at
            elif isinstance(effect, Send) and effect.to.startswith("control/"):
                self._step(int(effect.to.partition("/")[2]), [Received(machine.address, effect.message)])
            elif isinstance(effect, Send):
                self.out.append((effect.to, effect.message))

    def ask(self, subject: str, argument: str = "", shard: int = 0) -> Any:
        ((to, answer),) = self.say("n:0", ControlQuery("n:0/1", 9, subject, argument), shard=shard)
        assert isinstance(answer, ControlAnswer) and (to, answer.process, answer.number) == ("n:0", "n:0/1", 9)
        return answer.error or msgspec.msgpack.decode(answer.body)


def copy(object_id: bytes, size: int = 10) -> ObjectsChanged:
    return ObjectsChanged([ObjectUpdate(object_id, size)])


def hold(number: int, *added: bytes, born: bool = False) -> HoldObjects:
    return HoldObjects(number, list(added), [], list(added) if born else [])


def drop(*removed: bytes) -> HoldObjects:
    return HoldObjects(0, [], list(removed))


# -- objects ----------------------------------------------------------------------------------------------------------


def test_existing_objects_are_located_at_once_and_others_when_they_come_to_be() -> None:
    """The callback of the paper's figure 7b."""
    store = Store()
    store.say("n:0", copy(X))
    assert store.say("n:1", LocateObjects([X, Y])) == [("n:1", ObjectsLocated([Location(X, 10, ("n:0",))]))]
    assert store.say("n:2", LocateObjects([Y])) == []
    location = ObjectsLocated([Location(Y, 7, ("n:0",))])
    assert store.say("n:0", copy(Y, 7)) == [("n:1", location), ("n:2", location)]
    assert store.say("n:2", copy(Y, 7)) == [], "a callback is called once"


def test_copies_are_listed_in_order_until_they_are_dropped() -> None:
    store = Store()
    for node in ("n:1", "n:0", "n:1"):
        store.say(node, copy(X))
    assert store.shards[0].objects.location(X) == Location(X, 10, ("n:1", "n:0"))
    store.say("n:0", hold(1, X, born=True), copy(X, -1))
    assert store.shards[0].objects.location(X) == Location(X, 10, ("n:1",))


def test_an_object_is_freed_wherever_it_is_when_the_last_holder_lets_go() -> None:
    store = Store()
    assert store.say("n:0", copy(X), hold(1, X, born=True)) == [("n:0", HoldsCounted(1))]
    assert store.say("n:1", copy(X), hold(5, X)) == [("n:1", HoldsCounted(5))]
    assert store.say("n:0", drop(X)) == []
    assert store.say("n:1", drop(X)) == [("n:0", FreeObjects([X])), ("n:1", FreeObjects([X]))]
    assert store.shards[0].objects.rows == {}


def test_a_borrower_that_came_and_went_before_the_owner_spoke_frees_nothing() -> None:
    store = Store()
    store.say("n:1", copy(X), hold(1, X))
    assert store.say("n:1", drop(X)) == []
    assert store.say("n:0", hold(1, X, born=True)) == [("n:0", HoldsCounted(1))]
    assert store.say("n:0", drop(X)) == [("n:1", FreeObjects([X]))]


def test_holding_twice_takes_letting_go_twice() -> None:
    store = Store()
    store.say("n:0", copy(X), hold(1, X, born=True), hold(2, X))
    assert store.say("n:0", drop(X)) == []
    assert store.say("n:0", drop(X)) == [("n:0", FreeObjects([X]))]


def test_a_copy_reported_too_late_is_freed_at_once() -> None:
    store = Store()
    store.say("n:0", copy(X), hold(1, X, born=True))
    store.say("n:0", drop(X))
    assert store.say("n:1", copy(X)) == [("n:1", FreeObjects([X]))]
    assert store.shards[0].objects.rows == {}


def test_only_so_many_freed_objects_are_remembered() -> None:
    store = Store(freed_remembered=4)
    for number in range(20):
        object_id = ids.return_id(b"%016d" % number, 0)
        store.say("n:0", copy(object_id), hold(1, object_id, born=True))
        store.say("n:0", drop(object_id))
    assert store.say("n:1", copy(ids.return_id(b"%016d" % 0, 0))) == []
    assert store.say("n:1", copy(ids.return_id(b"%016d" % 19, 0))) != []


def test_a_copy_nobody_ever_held_leaves_no_row_behind() -> None:
    store = Store()
    store.say("n:0", copy(X))
    store.say("n:0", copy(X, -1))
    assert store.shards[0].objects.rows == {}


# -- nodes ------------------------------------------------------------------------------------------------------------


def test_who_joins_learns_of_all_and_all_learn_of_it() -> None:
    store = Store(nodes=1)
    zero, one = (NodeInfo(f"n:{i}", "", resources({"CPU": 2})) for i in range(2))
    assert store.say("n:1", RegisterNode(one)) == [
        ("n:1", NodesChanged([zero, one])),
        ("n:0", NodesChanged([one])),
        (PLACEMENT, NodesChanged([one])),
    ]


def test_a_lost_node_is_published_once_and_what_it_had_is_gone() -> None:
    store = Store(shards=2)
    shard = ids.shard_of(X, 2)
    store.say("n:1", copy(X), hold(1, X, born=True), shard=shard)
    store.say("n:0", copy(X), shard=shard)
    told = store.lose("n:1", "connection reset")
    dead = NodesChanged([NodeInfo("n:1", "", resources({"CPU": 2}), alive=False)])
    assert [(to, m) for to, m in told if isinstance(m, NodesChanged)] == [
        (to, dead) for to in ("n:0", "n:2", PLACEMENT)
    ]
    assert ("n:0", FreeObjects([X])) in told, "it was the last to hold X"
    assert store.lose("n:1") == []
    assert store.say("n:1", copy(Y), hold(2, Y), shard=ids.shard_of(Y, 2)) == [], "the dead are not heard"
    assert all(machine.objects.rows == {} for machine in store.shards)


def test_holders_and_seekers_learn_that_the_last_copy_is_lost_and_when_it_is_made_again() -> None:
    store = Store()
    store.say("n:0", hold(1, X, born=True))
    store.say("n:1", copy(X))
    lost = ObjectsLocated([Location(X, 10, ())])
    assert ("n:0", lost) in store.lose("n:1")
    assert store.say("n:2", LocateObjects([X])) == [("n:2", lost)]
    assert store.say("n:0", copy(X)) == [("n:2", ObjectsLocated([Location(X, 10, ("n:0",))]))]


def test_objects_whose_owner_died_before_it_spoke_are_freed_after_a_while() -> None:
    store = Store()
    store.say("n:0", copy(X))
    store.say("n:2", copy(Y), hold(1, Y))
    store.lose("n:1")
    (key,) = store.timers
    assert store.timers[key] == 10.0
    store.say("n:0", hold(1, X, born=True))
    assert store.fire(key) == [], "both are held"
    assert store.say("n:2", drop(Y)) == [("n:2", FreeObjects([Y]))]


def test_a_node_that_comes_back_is_heard_again() -> None:
    store = Store()
    store.lose("n:1")
    store.register(1)
    store.say("n:1", copy(X))
    assert store.shards[0].objects.location(X) == Location(X, 10, ("n:1",))


def test_cancelling_reaches_every_other_node_that_lives() -> None:
    store = Store(shards=2)
    store.lose("n:2")
    message = PublishCancel([b"s"], [])
    for shard in (0, 1):
        assert store.say("n:0", message, shard=shard) == [("n:1", message)]


# -- functions, tasks, events -----------------------------------------------------------------------------------------


def test_functions_are_handed_out_at_once_or_when_they_arrive() -> None:
    store = Store()
    f, g = Function(b"f", "f", b"1"), Function(b"g", "g", b"2")
    store.say("n:0", PutFunctions([f]))
    assert store.say("n:1", GetFunctions([b"f", b"g"])) == [("n:1", Functions([f]))]
    assert store.say("n:0", PutFunctions([g, Function(b"f", "f", b"another")])) == [("n:1", Functions([g]))]
    assert store.say("n:2", GetFunctions([b"f"])) == [("n:2", Functions([f]))], "a row never changes"


def spec(name: bytes, template: bytes = b"t") -> TaskSpec:
    return TaskSpec(name * 16, template, b"", (), (), b"s", "n:0/1")


F = TaskTemplate(b"t", b"f", "f", Kind.TASK, (), (), 1, 0)


def test_lineage_is_kept_until_it_is_forgotten() -> None:
    store = Store()
    store.say("n:0", LogTasks([TaskRecord(spec(b"a"), "n:0", -1), TaskRecord(spec(b"b"), "n:1", -1)], [F]))
    store.say("n:0", LogTasks([TaskRecord(spec(b"a"), "n:0", 0)], []))
    assert [(row["name"], row["state"], row["node"]) for row in store.ask("tasks")] == [
        ("f", "OK", "n:0"),
        ("f", "PENDING", "n:1"),
    ]
    store.say("n:0", ForgetTasks([b"a" * 16, b"c" * 16]))
    assert [row["task_id"] for row in store.ask("tasks")] == [(b"b" * 16).hex()]


def events(first: int, last: int) -> LogEvents:
    rows = [TaskEvent(b"%016d" % n, "f", "n:0/1", n, n, n, n + 1, 0) for n in range(first, last)]
    return LogEvents([PackedEvents.pack(rows)])


def test_the_event_log_keeps_the_newest() -> None:
    store = Store(events_kept=10)
    for first in range(0, 100, 4):
        store.say("n:0", events(first, first + 4))
    assert 10 <= len(store.shards[0].events) < 14
    assert [row["submitted_at"] for row in store.ask("timeline", "3")] == [97, 98, 99]
    assert [row["submitted_at"] for row in store.ask("timeline", "6")] == [94, 95, 96, 97, 98, 99]
    assert len(store.ask("timeline", "1000")) == len(store.shards[0].events)
    store.say("n:0", events(100, 200), LogEvents([]))
    assert len(store.shards[0].events) == 100, "a batch larger than the log is kept whole until the next"


# -- actors -----------------------------------------------------------------------------------------------------------

A, B = b"a" * 16, b"b" * 16
CREATE = TaskTemplate(b"c", b"f", "Counter", Kind.ACTOR_CREATION, (), (), 1, 1)


def actor(actor_id: bytes = A, state: ActorState = ActorState.ALIVE, node: str = "n:1", **fields: Any) -> ActorInfo:
    values: dict[str, Any] = {"name": "", "owner": "n:0", "creation": spec(b"a"), "template": CREATE, **fields}
    return ActorInfo(actor_id, values.pop("name"), "Counter", state, node, **values)


def changes(told: list[tuple[Address, AnyMessage]]) -> dict[Address, list[ActorInfo]]:
    return {to: message.actors for to, message in told if isinstance(message, ActorsChanged)}


def test_watchers_learn_of_an_actor_now_and_whenever_it_changes() -> None:
    store = Store()
    assert store.say("n:2", WatchActors([A])) == []
    assert changes(store.say("n:1", UpdateActors([actor()]))) == {"n:2": [actor()]}
    assert changes(store.say("n:0", WatchActors([A]))) == {"n:0": [actor()]}
    told = changes(store.say("n:1", UpdateActors([actor(state=ActorState.DEAD, reason="it left")])))
    dead = actor(state=ActorState.DEAD, reason="it left", creation=None, template=None)
    assert told == {"n:2": [dead], "n:0": [dead]}
    assert changes(store.say("n:1", UpdateActors([actor()]))) == {"n:1": [dead]}, "the dead stay dead"


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_a_name_belongs_to_one_living_actor(shards: int) -> None:
    store = Store(shards=shards)
    a, b = ids.shard_of(A, shards), ids.shard_of(B, shards)
    store.say("n:1", UpdateActors([actor(name="ns/joe")]), shard=a)
    assert store.ask("actor", "ns/joe")["actor_id"] == A.hex()
    told = changes(store.say("n:2", UpdateActors([actor(B, node="n:2", name="ns/joe")]), shard=b))
    (refused,) = told["n:2"]
    assert refused.state == ActorState.DEAD
    assert refused.reason == (
        "an actor named 'joe' exists already in the namespace 'ns' (a Counter); "
        "choose another name, or use that one: get_actor('joe')"
    )
    assert changes(store.say("n:0", WatchActors([B]), shard=b)) == {"n:0": [refused]}
    store.say("n:1", UpdateActors([actor(state=ActorState.DEAD, name="ns/joe")]), shard=a)
    assert "no actor named 'joe' in the namespace 'ns'" in store.ask("actor", "ns/joe")
    c = b"c" * 16
    store.say("n:2", UpdateActors([actor(c, node="n:2", name="ns/joe")]), shard=ids.shard_of(c, shards))
    assert store.ask("actor", "ns/joe") | {"actor_id": c.hex(), "state": "ALIVE"} == store.ask("actor", "ns/joe")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_dead_nodes_actors_go_back_to_their_owner_while_restarts_are_left(shards: int) -> None:
    store = Store(shards=shards)
    shard = ids.shard_of(A, shards)
    store.say("n:2", WatchActors([A]), shard=shard)
    store.say("n:1", UpdateActors([actor(name="ns/joe")]), shard=shard)
    told = changes(store.lose("n:1", "killed"))
    (row,) = told["n:0"]
    assert (row.state, row.node, row.reason) == (ActorState.RESTARTING, "", "its node n:1 died (killed)")
    assert row.creation is not None and row.template is not None and told["n:2"] == [row]
    store.say("n:2", UpdateActors([actor(node="n:2", name="ns/joe")]), shard=shard)
    assert store.ask("actor", "ns/joe")["node"] == "n:2"
    (row,) = changes(store.lose("n:2"))["n:0"]
    assert (row.state, row.reason) == (ActorState.DEAD, "the actor Counter is dead: its node n:2 died")
    assert "no actor named" in store.ask("actor", "ns/joe")


def test_an_actor_dies_with_its_node_when_nobody_can_restart_it() -> None:
    store = Store()
    store.say("n:1", UpdateActors([actor(owner="n:1")]))
    store.say("n:0", WatchActors([A]))
    (row,) = changes(store.lose("n:1"))["n:0"]
    assert row.state == ActorState.DEAD


# -- queries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
def test_views_gather_the_rows_of_all_shards(shards: int) -> None:
    store = Store(shards=shards)
    everything = [ids.return_id(b"%016d" % n, 0) for n in range(9)]
    for object_id in everything:
        store.say("n:0", copy(object_id), hold(1, object_id, born=True), shard=ids.shard_of(object_id, shards))
    rows = store.ask("objects", shard=shards - 1)
    assert sorted(row["object_id"] for row in rows) == [object_id.hex() for object_id in everything]
    assert rows[0] | {"size": 10, "nodes": ["n:0"], "held_by": ["n:0"]} == rows[0]
    store.say("n:1", UpdateActors([actor()]), shard=ids.shard_of(A, shards))
    assert [row["state"] for row in store.ask("actors")] == ["ALIVE"]
    assert store.ask("resources") == {"CPU": 6.0}
    assert [(row["node"], row["alive"], row["resources"]) for row in store.ask("nodes")] == [
        (f"n:{index}", True, {"CPU": 2.0}) for index in range(3)
    ]


def test_bad_questions_are_answered_with_a_sentence() -> None:
    store = Store()
    assert "no view called 'wheels'" in store.ask("wheels") and "timeline" in store.ask("wheels")
    assert "'many'" in store.ask("tasks", "many")


# -- the promise ------------------------------------------------------------------------------------------------------

SMALL = settings(max_examples=50, stateful_step_count=60, deadline=None)


class Link(msgspec.Struct):
    """A message from a node to another: the reference in it is pinned by the sender until ``done`` comes back."""

    object_id: bytes
    keeps: bool = False
    """The task keeps the reference beyond its end; otherwise the object is merely its input."""
    done: bool = False


class Node:
    """The tables of a real node, and one process whose references the test decides."""

    def __init__(self, number: int, shards: int) -> None:
        self.address = f"n:{number}"
        self.process = f"n:{number}/1"
        self.ledger = HoldLedger(shards)
        self.table = ObjectTable(1 << 16, self.ledger)

    def refers(self, object_id: bytes) -> bool:
        entry = self.table.entries.get(object_id)
        return entry is not None and bool(entry.holders or entry.pins)


class References(RuleBasedStateMachine):
    """Nodes pass references around; every link delays as it likes and keeps its own order only."""

    @initialize(shards=st.sampled_from([1, 2]))
    def begin(self, shards: int) -> None:
        self.shards = [ControlMachine(shard, shards) for shard in range(shards)]
        self.nodes = {f"n:{number}": Node(number, shards) for number in range(3)}
        self.links: dict[tuple[Address, Address], deque[AnyMessage | Link]] = {}
        self.objects: list[bytes] = []
        self.freed: set[bytes] = set()

    def send(self, source: Address, to: Address, message: AnyMessage | Link) -> None:
        self.links.setdefault((source, to), deque()).append(message)

    def close(self, node: Node, then: list[AnyEffect] | None = None) -> None:
        """What a node does at the end of each step."""
        shards = len(self.shards)
        updates, node.table.updates = node.table.updates, []
        for update in updates:
            shard = control_address(ids.shard_of(update.object_id, shards))
            self.send(node.address, shard, ObjectsChanged([update]))
        for effect in node.ledger.flush(then or []):
            assert isinstance(effect, Send)
            self.send(node.address, effect.to, effect.message)
        node.table.validate()

    @rule(number=st.integers(0, 2), inner=st.booleans())
    def make(self, number: int, inner: bool) -> None:
        """A process puts an object, which may contain a reference that it has."""
        if sum(any(node.refers(o) for node in self.nodes.values()) for o in self.objects) >= 3:
            return  # few objects, so that much happens to each
        node = self.nodes[f"n:{number}"]
        object_id = ids.put_id(b"%016d" % number, len(self.objects))
        held = [o for o in self.objects if node.process in getattr(node.table.entries.get(o), "holders", ())]
        contained = (held[-1],) if inner and held else ()
        entry = node.table.expect(object_id, node.process)
        node.table.seal(entry, State.INLINE, payload=b"1", size=1, contained=contained)
        self.objects.append(object_id)
        self.close(node)

    def pick(self, node: Node, index: int) -> bytes | None:
        """One of the objects to which the node's process has a reference."""
        held = [o for o in self.objects if node.process in getattr(node.table.entries.get(o), "holders", ())]
        return held[index % len(held)] if held else None

    @rule(number=st.integers(0, 2), to=st.integers(0, 2), index=st.integers(0, 9), keeps=st.booleans())
    def lend(self, number: int, to: int, index: int, keeps: bool) -> None:
        """A task that was given a reference goes to another node."""
        node = self.nodes[f"n:{number}"]
        object_id = self.pick(node, index)
        if object_id is not None and to != number:
            entry = node.table.entries[object_id]
            node.table.pin(entry)
            node.table.export(entry)
            self.send(node.address, f"n:{to}", Link(object_id, keeps))
            self.close(node)

    @rule(number=st.integers(0, 2), index=st.integers(0, 9))
    def let_go(self, number: int, index: int) -> None:
        node = self.nodes[f"n:{number}"]
        object_id = self.pick(node, index)
        if object_id is not None:
            node.table.unhold(node.table.entries[object_id], node.process)
            self.close(node)

    @rule(number=st.integers(0, 2), index=st.integers(0, 9))
    def fetch(self, number: int, index: int) -> None:
        """A node gets a copy of an object that its process refers to, with what the object contains."""
        node = self.nodes[f"n:{number}"]
        object_id = self.pick(node, index)
        if object_id is None or node.table.entries[object_id].local:
            return
        for other in self.nodes.values():
            source = other.table.entries.get(object_id)
            if source is not None and source.local:
                for inner in source.contained:
                    other.table.export(other.table.know(inner))
                self.close(other)
                entry = node.table.entries[object_id]
                node.table.seal(entry, State.INLINE, payload=b"1", size=1, contained=source.contained, primary=False)
                self.close(node)
                return

    @rule(pick=st.integers(0, 99), count=st.integers(1, 3))
    def deliver(self, pick: int, count: int) -> None:
        waiting = [link for link, queue in self.links.items() if queue]
        if waiting:
            link = waiting[pick % len(waiting)]
            for _ in range(min(count, len(self.links[link]))):
                self.arrive(*link, self.links[link].popleft())

    @rule(slow=st.integers(0, 2))
    def deliver_all_but(self, slow: int) -> None:
        """Everything arrives but what one node says to the control store."""
        for _ in range(100):
            waiting = [
                (source, to) for (source, to), queue in self.links.items()
                if queue and not (source == f"n:{slow}" and to.startswith("control/"))
            ]  # fmt: skip
            if not waiting:
                return
            self.arrive(*waiting[0], self.links[waiting[0]].popleft())

    def arrive(self, source: Address, to: Address, message: AnyMessage | Link) -> None:
        if to.startswith("control/"):
            assert not isinstance(message, Link)
            shard = self.shards[int(to.partition("/")[2])]
            for effect in shard.step([Received(source, message)], 0.0):
                assert isinstance(effect, Send)
                if isinstance(effect.message, FreeObjects):
                    self.check_freed(effect.message.object_ids)
                self.send(shard.address, effect.to, effect.message)
            shard.validate()
            return
        node = self.nodes[to]
        then: list[AnyEffect] = []
        if isinstance(message, HoldsCounted):
            node.ledger.acknowledge(message.number)
        elif isinstance(message, FreeObjects):
            for object_id in message.object_ids:
                node.table.freed(object_id)
        elif isinstance(message, Link) and message.done:
            node.table.unpin(node.table.entries[message.object_id])
        elif isinstance(message, Link):
            entry = node.table.know(message.object_id)
            if message.keeps:  # the task is done once the hold is counted
                node.table.hold(entry, node.process)
            elif not entry.local:  # its bytes came; what it contains is left out here
                node.table.seal(entry, State.INLINE, payload=b"1", size=1, primary=False)
            reply: Any = Link(message.object_id, done=True)
            then = [Send(source, reply)]
        self.close(node, then)

    def check_freed(self, object_ids: list[bytes]) -> None:
        for object_id in object_ids:
            for node in self.nodes.values():
                assert not node.refers(object_id), "freed while a node refers to it"
            for queue in self.links.values():
                assert not any(isinstance(m, Link) and m.object_id == object_id and not m.done for m in queue), "lent"
            self.freed.add(object_id)

    @invariant()
    def what_is_referred_to_exists(self) -> None:
        for object_id in self.objects:
            if any(node.refers(object_id) for node in self.nodes.values()):
                assert any(
                    object_id in node.table.entries and node.table.entries[object_id].local
                    for node in self.nodes.values()
                ), "a reference to nothing"

    def teardown(self) -> None:
        if not hasattr(self, "shards"):
            return
        for node in self.nodes.values():
            while (object_id := self.pick(node, 0)) is not None:
                node.table.unhold(node.table.entries[object_id], node.process)
            self.close(node)
        for turn in range(10_000):
            waiting = [link for link, queue in self.links.items() if queue]
            if not waiting:
                break
            link = waiting[turn % len(waiting)]
            self.arrive(*link, self.links[link].popleft())
            for node in self.nodes.values():  # what arrived with the last links is let go as well
                while (object_id := self.pick(node, 0)) is not None:
                    node.table.unhold(node.table.entries[object_id], node.process)
                    self.close(node)
        assert not any(self.links.values()), "it does not come to rest"
        for node in self.nodes.values():
            assert node.table.entries == {}, "something was never freed"
        for shard in self.shards:
            assert shard.objects.rows == {}, "a row was kept for an object that is gone"


TestReferences = References.TestCase
TestReferences.settings = SMALL


def test_the_promise_holds_on_long_random_walks() -> None:
    """The same rules drawn by hand: many more steps in the time, and the same ones in each run."""
    for seed in range(150):
        rng = Random(seed)
        walk = References()
        walk.begin(shards=1 + seed % 2)
        for _ in range(120):
            number, to, index = rng.randrange(3), rng.randrange(3), rng.randrange(10)
            match rng.randrange(12):
                case 0 | 1:
                    walk.make(number=number, inner=index < 3)
                case 2 | 3 | 4:
                    walk.lend(number=number, to=to, index=index, keeps=index < 6)
                case 5 | 6 | 7:
                    walk.let_go(number=number, index=index)
                case 8:
                    walk.fetch(number=number, index=index)
                case 9:
                    walk.deliver_all_but(slow=number)
                case _:
                    walk.deliver(pick=rng.randrange(100), count=1 + index % 3)
            walk.what_is_referred_to_exists()
        walk.teardown()


def test_a_copy_that_died_before_anybody_held_it_is_known_to_be_lost_for_a_while() -> None:
    store = Store()
    store.say("n:1", copy(X))
    store.lose("n:1")
    assert store.say("n:2", LocateObjects([X])) == [("n:2", ObjectsLocated([Location(X, 10, ())]))]
    (key,) = store.timers
    store.fire(key)
    assert all(machine.objects.rows == {} for machine in store.shards)
